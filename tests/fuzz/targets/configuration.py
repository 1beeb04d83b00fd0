"""Configuration files: either a one-line error, or settings that `check-config` prints as an equivalent file."""

from collections import defaultdict

from harmonia.cli.check_config import explained
from harmonia.config import loader
from harmonia.config.settings import Settings
from harmonia.errors import ConfigError

WORDS = [f"\n{name} = ".encode() for name in Settings.__struct_fields__]
WORDS += [
    b"[zstd]\n",
    b"[[upstream]]\n",
    b"[publish]\n",
    b"[release]\n",
    b'url = "https://x"',
    b"true",
    b'"',
    b"'''",
    b"[",
    b"]",
    b"{",
]

_ENVIRONMENT = {"HOME": "/home"}


def check(data: bytes) -> bool:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return False
    try:
        settings = loader.parse(text, "file", _ENVIRONMENT)
    except ConfigError as error:
        message = str(error)
        assert message.startswith("file")
        assert message.isprintable()
        assert len(message) < 1000
        return False
    again = "\n".join(explained(settings, defaultdict(str)))
    assert loader.parse(again, "again", _ENVIRONMENT) == _found(settings)
    return True


def _found(settings: Settings) -> Settings:
    """Return the settings with explicit values for found defaults."""
    return loader.parse("\n".join(explained(settings, defaultdict(str))), "found", _ENVIRONMENT)
