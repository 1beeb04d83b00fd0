"""Harmonia, a Nix binary cache that serves a machine's own store over HTTP."""

__version__ = "0.1.0"
