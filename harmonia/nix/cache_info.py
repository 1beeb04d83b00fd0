"""Text of `nix-cache-info`, the description of a binary cache (Nix `src/libstore/binary-cache-store.cc`)."""


def parse(text: bytes) -> dict[str, str]:
    """Return the values by their names, like Nix: values are trimmed, names are not, and the last value counts."""
    lines = (line.partition(":") for line in text.decode(errors="replace").splitlines())
    return {name: value.strip() for name, _, value in lines}
