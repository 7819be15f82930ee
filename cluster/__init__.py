"""The sweep on Ray: recipe → corpus → harvest → stream → exchange → fit → evaluate → publish."""
