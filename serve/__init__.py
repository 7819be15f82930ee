"""The endpoint that other teams call; it reads published dictionaries and needs no training code."""
