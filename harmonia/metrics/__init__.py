"""Counters that all workers share, and their Prometheus text format."""
