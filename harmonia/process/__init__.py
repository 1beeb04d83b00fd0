"""Main process and its surroundings: supervisor, sockets, systemd, start-up checks, logging."""
