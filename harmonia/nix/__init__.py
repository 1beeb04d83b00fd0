"""Formats and names of Nix: pure, synchronous code, without network and event loop."""
