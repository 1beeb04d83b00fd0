"""The URL of a server, on the command line."""

import click

from harmonia.errors import FormatError
from harmonia.tools.http_client import Client


def parse_url(text: str) -> Client:
    """Return a client of the server with this URL. Raises BadParameter if it is malformed."""
    try:
        return Client(text)
    except FormatError as error:
        raise click.BadParameter(str(error)) from error
