"""Attacks on a server, each with another client beside it: `make attack`."""
