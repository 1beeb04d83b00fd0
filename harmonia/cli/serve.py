"""`harmonia serve`, which also runs if no command is given."""

import gc
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial

import click

from harmonia import __version__, cli
from harmonia.cache.disk_cache import sweep_all
from harmonia.config import credentials
from harmonia.config.loader import Source
from harmonia.config.settings import Settings
from harmonia.nix.signing import SecretKey
from harmonia.process import log_setup, preflight, sockets, systemd
from harmonia.process.supervisor import Supervisor
from harmonia.server import worker

_log = logging.getLogger("harmonia")


@click.command("serve")
@cli.bind_option
@click.pass_obj
def command(config_file: str | None, bind: str | None) -> None:
    """Serve until SIGTERM. SIGHUP reloads the TLS certificate and the tokens."""
    with preflight.checked(Source.read(config_file, os.environ, bind)) as settings:
        status = _serve(settings)
    sys.exit(status)


def _overview(settings: Settings, keys: Sequence[SecretKey]) -> Iterator[str]:
    """Yield what an operator asks first: workers, keys, cache, bucket, upstreams, and what readers need."""
    yield f"{settings.workers} worker{'s' if settings.workers != 1 else ''}"
    yield f"signs with {', '.join(key.name for key in keys)}" if keys else "signs nothing"
    size = "half of the free space, at most 20 GiB" if settings.cache_size is None else settings.cache_size
    yield f"cache {settings.cache_dir} ({size})"
    if settings.mirror.is_read:
        yield f"bucket {settings.mirror.url}"
    if settings.upstream:
        yield f"upstreams {', '.join(upstream.url for upstream in settings.upstream)}"
    needs = ["a client certificate"] if settings.tls_client_ca_path else []
    if settings.tokens_path and "read" not in settings.anonymous_scopes:
        needs.append("a token")
    yield f"readers need {' and '.join(needs)}" if needs else "everyone may read"


def _serve(settings: Settings) -> int:
    keys = credentials.secret_keys(settings)
    log_setup.to_stderr(settings)
    inherited = systemd.inherited_sockets(os.environ)
    with (
        nullcontext(inherited) if inherited else sockets.listen(settings, "bind") as listening,
        sockets.listen(settings, "metrics_bind") as for_metrics,
    ):
        context = worker.prepare(settings, keys)
        work = partial(worker.run, context, for_metrics)
        idle = (settings.idle_exit, context.metrics.responses) if settings.idle_exit and inherited else None
        supervisor = Supervisor(work, [*listening, *for_metrics], settings.processes, settings.shutdown_grace, idle)
        if settings.idle_exit and not inherited:
            _log.warning(
                "idle_exit has no effect: systemd passed no socket; use the units in docs/systemd, or remove it"
            )
        for each in listening:
            url = sockets.url(each.getsockname(), tls=bool(settings.tls_cert_path))
            _log.info("serving %s at %s", settings.real_store, url)
        for each in for_metrics:
            _log.info("metrics are at %s/metrics", sockets.url(each.getsockname(), tls=False))
        _log.info("Harmonia %s: %s", __version__, "; ".join(_overview(settings, keys)))
        if (admitted := sockets.connection_limit(settings.max_connections)) < settings.max_connections:
            what = "max_connections: the open-file limit allows only %d per worker; raise LimitNOFILE= or ulimit -Hn"
            _log.warning(what, admitted)
        gc.freeze()  # otherwise, a full collection in a worker that starts copies 10 MiB of pages that all share
        status = supervisor.run()
    sweep_all(str(settings.cache_dir))  # removes unfinished files of the workers
    return status
