"""Types of command-line arguments: URLs, durations, sizes."""

import click

from harmonia.config import amounts
from harmonia.errors import FormatError
from harmonia.tools.http_client import Client
from harmonia.untrusted import integer

_MAX_MEBIBYTES = 1 << 43


def parse_url(text: str) -> Client:
    """Return a client of the server with this URL. Raises BadParameter if it is malformed."""
    try:
        return Client(text)
    except FormatError as error:
        raise click.BadParameter(str(error)) from error


class Duration(click.FloatRange):
    """Seconds, or a duration like 500ms or 12h."""

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return float(super().convert(amounts.duration(str(value)), param, ctx))
        except FormatError as error:
            self.fail(str(error), param, ctx)


class Mebibytes(click.IntRange):
    """A number of MiB, or a size like 512K or 1GB, rounded up to MiB."""

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value)
        try:
            count = integer(text, _MAX_MEBIBYTES)
            if count is None:
                count = -(-amounts.size(text) >> 20)
        except FormatError as error:
            self.fail(str(error), param, ctx)
        return int(super().convert(count, param, ctx))
