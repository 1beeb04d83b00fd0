"""`harmonia top`."""

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice

import click
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from harmonia.cli import progress
from harmonia.cli.arguments import Duration, parse_url
from harmonia.cli.progress import byte_size
from harmonia.config import loader
from harmonia.errors import RemoteError
from harmonia.tools import top
from harmonia.tools.http_client import Client
from harmonia.tools.top import Snapshot


@click.command("top")
@click.argument("client", type=parse_url, metavar="[URL]", required=False)
@click.option(
    "--interval",
    type=Duration(0.1, 3600),
    metavar="SECONDS",
    default=2.0,
    show_default=True,
    help="Time between two views.",
)
@click.option("--once", is_flag=True, help="Print one view after one interval, then exit.")
@click.pass_obj
def command(config_file: str | None, client: Client | None, *, interval: float, once: bool) -> None:
    """Show the load of a running server, updated until Ctrl-C.

    Shows requests, bytes, downloads in flight, and the hit ratio of the cache of compressed NARs. URL is that of the
    server or of its `metrics_bind` (default: from the settings). If the server stops, `top` waits until it is back. If
    stdout is not a terminal, each view is printed below the last one.
    """
    client = client or _own(config_file)
    console = progress.console()
    with suppress(KeyboardInterrupt):
        views = _views(client, interval, once=once)
        if once or not console.is_terminal:
            for view in islice(views, 1 if once else None):
                console.print(view)
            return
        console.soft_wrap = False  # the screen has a fixed width
        with Live(next(views), console=console, screen=True, auto_refresh=False) as live:
            for view in views:
                live.update(view, refresh=True)


def _views(client: Client, interval: float, *, once: bool) -> Iterator[RenderableType]:
    before = top.fetch_snapshot(client)
    while True:
        time.sleep(interval)
        try:
            now = top.fetch_snapshot(client)
        except RemoteError as error:
            if once:
                raise
            yield Text(str(error), style="red")
            continue
        yield _view(client, before, now)
        before = now


def _own(config_file: str | None) -> Client:
    settings = loader.read(config_file, os.environ)
    return Client.of(settings, "metrics_bind" if settings.metrics_bind else "bind")


def _view(client: Client, before: Snapshot, now: Snapshot) -> RenderableType:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("route", "requests", "/s", "bytes", "/s", "in flight", "5xx"):
        table.add_column(title, justify="left" if title == "route" else "right", no_wrap=True)
    rows = [row for row in top.route_activities(before, now) if row.requests or row.in_flight]
    for row in rows:
        table.add_row(
            row.route,
            f"{row.requests:.0f}",
            f"{row.request_rate:.1f}",
            byte_size(row.sent),
            byte_size(row.sent_rate),
            f"{row.in_flight:.0f}",
            Text(f"{row.failed:.0f}", style="red" if row.failed else ""),
        )
    ratio = top.hit_ratio(now)
    downloads = now.total("harmonia_requests_in_flight", route="nar")
    head = (
        f"harmonia at {client.url}: {sum(row.request_rate for row in rows):.1f} requests/s,"
        f" {byte_size(sum(row.sent_rate for row in rows))}/s, {downloads:.0f} downloads in flight"
    )
    cache = (
        f"compressed NARs: {'-' if ratio is None else f'{ratio:.1%}'} hits,"
        f" {now.total('harmonia_cache_fills_total'):.0f} made,"
        f" {now.total('harmonia_cache_evictions_total'):.0f} evicted,"
        f" {now.total('harmonia_encoder_waiting'):.0f} pieces being compressed;"
        f" {now.total('harmonia_worker_restarts_total'):.0f} workers replaced"
    )
    return Group(Text(head, style="bold"), Text(cache), Text(), table)
