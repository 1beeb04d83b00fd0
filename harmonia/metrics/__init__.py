"""Counters shared by all workers, and their Prometheus text."""
