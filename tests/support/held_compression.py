"""A server that compresses nothing, or only a first frame, while a file exists."""

from pathlib import Path

from support.running import patched


def held_by(file: Path, *, least: int = 0, patch: str = "") -> list[str]:
    """Return the command of a server whose compression of `least` bytes or more waits until `file` is gone.

    `patch` is a program that changes the server further.
    """
    file.touch()
    return patched(
        f"{patch}\n"
        "import pathlib, time\n"
        "from harmonia.cache.zstd import Encoding\n"
        "compress = Encoding.compress\n"
        "def held(self, data):\n"
        f"    while len(data) >= {least} and pathlib.Path({str(file)!r}).exists():\n"
        "        time.sleep(0.01)\n"
        "    return compress(self, data)\n"
        "Encoding.compress = held"
    )
