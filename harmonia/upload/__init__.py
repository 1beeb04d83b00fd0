"""Uploads of store paths to other binary caches: a durable queue, and the upload of closures, references first."""
