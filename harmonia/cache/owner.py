"""User of commands that use the server's cache directory."""

import os

import msgspec

from harmonia.config.settings import Settings
from harmonia.errors import ConfigError


def become_owner(settings: Settings) -> Settings:
    """Switch from root to the owner of the cache directory, so that the server can read new files.

    Return settings with a path to the directory that the new user can open. Raises ConfigError if the directory belongs
    to another user and this process is not root.
    """
    cache_dir = directory = os.path.abspath(str(settings.cache_dir))
    while not os.path.exists(directory):
        directory = os.path.dirname(directory)
    owner = os.stat(directory)
    if owner.st_uid == os.geteuid() or directory != cache_dir:
        return settings
    if os.geteuid() != 0:
        raise ConfigError(f"cache_dir: {directory!r} belongs to another user; run this as root or as that user")
    opened = os.open(cache_dir, os.O_PATH | os.O_DIRECTORY)  # only root can traverse systemd's /var/cache/private
    os.setgroups([])
    os.setgid(owner.st_gid)
    os.setuid(owner.st_uid)
    return msgspec.structs.replace(settings, cache_dir=f"/proc/self/fd/{opened}")
