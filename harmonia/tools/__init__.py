"""Implementations of the commands that are not the server."""
