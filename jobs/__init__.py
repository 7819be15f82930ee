"""What a person submits: each job parses, builds and runs."""
