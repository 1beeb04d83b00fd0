"""Tables of the configuration file: one module each, with its keys and the checks of their values."""
