"""Text from outside: numbers are bounded before they are parsed, and excerpts before they are logged."""

_EXCERPT_MAX_CHARS = 100  # characters of it that a message shows


def integer(text: str | bytes, highest: int, base: int = 10) -> int | None:
    """Return the number that ASCII digits spell, or None if there is anything else or it is above `highest`.

    `int` itself takes signs, spaces, underscores and the digits of all scripts, and raises an error for thousands of
    digits. All text from outside is read here: a test looks for other calls of `int`.
    """
    digits = text.decode("ascii", "replace") if isinstance(text, bytes) else text
    if not digits.isascii() or not digits.isalnum():
        return None
    digits = digits.lstrip("0") or "0"
    if len(digits) > highest.bit_length() + 1:
        return None
    try:
        number = int(digits, base)
    except ValueError:
        return None
    return number if number <= highest else None


def excerpt(text: str | bytes) -> str:
    """Return the text in quotes, escaped and cut, as it is fit for a message or a log."""
    shown = repr(text[:_EXCERPT_MAX_CHARS])
    return f"{shown}…" if len(text) > _EXCERPT_MAX_CHARS else shown
