"""The endpoint that other teams call: published dictionaries over HTTP, on Ray Serve.

A request passes the gate (token, rate, room, size), is read in its format, and is answered by a replica that holds the
dictionary. Ray's own module is imported as `ray_serve` here: this package has its name.
"""
