"""A server that compresses nothing as long as a file exists."""

from pathlib import Path

from support.running import patched


def held_by(file: Path) -> list[str]:
    """Return the command of a server whose compression waits until `file` is gone."""
    file.touch()
    return patched(
        "import pathlib, time\n"
        "from harmonia.cache.zstd import Encoding\n"
        "compress = Encoding.compress\n"
        "def held(self, data):\n"
        f"    while pathlib.Path({str(file)!r}).exists():\n"
        "        time.sleep(0.01)\n"
        "    return compress(self, data)\n"
        "Encoding.compress = held"
    )
