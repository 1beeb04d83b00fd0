"""Configuration: validated settings from a TOML file and the environment."""
