"""Main process: supervisor, sockets, systemd, start-up checks and logging."""
