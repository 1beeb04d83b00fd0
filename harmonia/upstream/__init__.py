"""Other binary caches, which are asked for what is not in the store."""
