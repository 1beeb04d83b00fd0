"""Content-Type of files in the store: by the extension, otherwise by whether the content is UTF-8 text."""

import mimetypes
import os

from harmonia.store.object_files import SAMPLE_BYTES

# The types in the standard library depend on its version and on /etc/mime.types. The types below are those that web
# sites need, or that make browsers show a file instead of saving it.
_TYPES = mimetypes.MimeTypes(())
for _type, _extensions in {
    "text/html": ".html .htm",
    "text/css": ".css",
    "text/javascript": ".js .mjs",
    "application/json": ".json .map",
    "application/manifest+json": ".webmanifest",
    "application/wasm": ".wasm",
    "application/xhtml+xml": ".xhtml",
    "application/xml": ".xml .xsl .xsd",
    "application/octet-stream": ".a .o .so",
    "application/zstd": ".zst",
    "font/otf": ".otf",
    "font/ttf": ".ttf",
    "font/woff": ".woff",
    "font/woff2": ".woff2",
    "image/avif": ".avif",
    "image/svg+xml": ".svg",
    "image/webp": ".webp",
    "image/x-icon": ".ico",
    "text/plain": ".bash .c .cfg .conf .drv .h .ini .log .md .nix .patch .pl .py .rs .sh .toml .ts .yaml .yml",
}.items():
    for _extension in _extensions.split():
        _TYPES.add_type(_type, _extension)
_ENCODINGS = {"gzip": "application/gzip", "bzip2": "application/x-bzip2", "xz": "application/x-xz"}
PDF = "application/pdf"
_SOURCES = {"text/plain", "text/css", "text/csv", "text/javascript", "application/json", "application/xml"}
_COMPRESSED = ("image/", "audio/", "video/", "font/", "application/zip", "application/zstd", PDF)


def of(name: bytes, sample: bytes) -> str:
    """Return the Content-Type of a file by its name and the first bytes of its content.

    If the extension is unknown, UTF-8 is text/plain and all else application/octet-stream.
    """
    utf8 = is_text(sample)
    guessed, encoding = _TYPES.guess_type("./" + os.fsdecode(name).lower())
    if encoding:
        return _ENCODINGS.get(encoding, "application/octet-stream")
    guessed = guessed or ("text/plain" if utf8 else "application/octet-stream")
    if guessed.startswith("text/x-"):  # such as source code, which some browsers save instead of showing
        guessed = "text/plain"
    return f"{guessed}; charset=utf-8" if guessed.startswith("text/") and utf8 else guessed


def is_text(sample: bytes) -> bool:
    """Return True if the first bytes of a file are UTF-8 without NUL. SAMPLE_BYTES may end within a character."""
    try:
        return b"\0" not in sample and len(sample.decode()) >= 0
    except UnicodeDecodeError as error:
        return len(sample) == SAMPLE_BYTES and error.reason == "unexpected end of data"


def is_source(content_type: str) -> bool:
    """Return True if people want to read the text of a file of this type, and not a page or a picture made from it."""
    return content_type.partition(";")[0] in _SOURCES


def is_compressible(content_type: str) -> bool:
    compressed = content_type.startswith((*_COMPRESSED, *_ENCODINGS.values()))
    return content_type == "image/svg+xml" or not compressed
