"""Configuration: TOML file and environment to validated settings."""
