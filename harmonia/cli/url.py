"""The URL of a server, on the command line."""

import click

from harmonia.errors import FormatError
from harmonia.tools.http_client import Client


class Url(click.ParamType[Client]):
    """Makes a client of that server."""

    name = "URL"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Client:
        try:
            return Client(str(value))
        except FormatError as error:
            self.fail(str(error), param, ctx)
