"""Upstreams: other binary caches, which serve the paths that the local store does not have."""
