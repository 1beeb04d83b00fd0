"""Measurements: each function answers one question with figures.

Measurements that need a program that is not installed are skipped.
"""

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path

from benchmarks import servers
from benchmarks.client import Downloads, ask
from benchmarks.commits import PER_SECOND
from benchmarks.figures import Figure, Measure, Sample, compare
from benchmarks.servers import HARMONIA, Server
from benchmarks.store import MIB, BenchStore
from harmonia.metrics.outcome import Outcome
from harmonia.metrics.shared_counters import Metrics
from harmonia.nix import base32
from harmonia.tools.fixture_tree import remove_tree
from harmonia.tools.store_builder import StoreBuilder

HAVE = {program: shutil.which(program) is not None for program in ("nginx", "wrk", "nix-store", "zstd")}

GIB = 1 << 30
_REQUESTS = "1,000 requests"
_ZSTD = {"Accept-Encoding": "zstd"}
_LEVEL = 3  # zstd level, our default
_SLOW = 64  # slow downloads during the requests for narinfos
_CONCURRENT = 200  # concurrent downloads during the measurement of memory
_WORKERS = 2  # worker processes during that measurement


@contextmanager
def side_by_side(
    store: BenchStore, suffix: str = "", *, workers: int = 1, database: Path | None = None
) -> Iterator[dict[str, Server]]:
    """Start Harmonia with NARs of this suffix, nginx with copies of its responses, and the server of BENCH_OTHER."""
    with ExitStack() as stack:
        settings = f"nar_compression = '{'zstd' if suffix else 'none'}'"
        ours = servers.harmonia(store, settings, database=database, workers=workers)
        running = {HARMONIA: stack.enter_context(ours)}
        if HAVE["nginx"]:
            running["nginx"] = stack.enter_context(servers.nginx(servers.copied(store, suffix), workers))
        if servers.OTHER:
            other = servers.other(store, database=database, workers=workers)
            running[servers.OTHER_NAME] = stack.enter_context(other)
        yield running


def metered(server: Server, work: float, measure: Callable[[], Sequence[float]]) -> Sample:
    """Return a measurement with the processor time of the server for each unit of `work`."""
    began = server.seconds
    values = measure()
    return Sample(values, (server.seconds - began) / work)


def each(running: Mapping[str, Server], measure: Callable[[Server], Sequence[float] | Sample]) -> dict[str, Measure]:
    """Return the same measurement for each of the servers."""
    return {name: lambda server=server: measure(server) for name, server in running.items()}  # type: ignore[misc]


def narinfos(store: BenchStore) -> Iterator[Figure]:
    paths = [servers.narinfo(info) for info in store.closure]

    def once(server: Server) -> Sample:
        return metered(
            server, len(paths) / 1000, lambda: [Downloads(server.address, paths).run()[0] / len(paths) * 1e6]
        )

    def cold() -> Sample:
        with servers.harmonia(store) as server:
            return once(server)

    with side_by_side(store, ".zst") as running:
        figure = Figure("narinfo, the first time, one after the other", "µs", "nginx", other_at_least=1, work=_REQUESTS)
        yield from compare([figure], each(running, once) | {HARMONIA: cold}, store.form.rounds)
        if not HAVE["wrk"]:
            return
        absent = [f"/{base32.encode(number.to_bytes(20, 'little'))}.narinfo" for number in range(500)]
        for name, asked, connections in (("narinfo", paths, 1), ("narinfo", paths, 25), ("narinfo, 404", absent, 25)):

            def often(server: Server) -> Sample:
                return _asked(server, asked, connections, store.form.seconds)  # noqa: B023 (called in the same iteration)

            alone = connections == 1
            what = f"{name}, {'one after the other' if alone else f'{connections} connections'}"
            figures = [
                Figure(
                    what, "requests/s", "nginx", at_least=0.5 if asked is paths and not alone else None, work=_REQUESTS
                ),
                Figure(f"{what}, median", "µs", "nginx", at_most=2 if alone else None),
                Figure(f"{what}, 99th percentile", "µs", "nginx", at_most=None if alone else 2),
            ]
            yield from compare(figures, each(running, often), store.form.rounds)


def _asked(server: Server, paths: Sequence[str], connections: int, seconds: int) -> Sample:
    """Request the paths again and again. Return the rate, the median and the 99th percentile in µs."""
    began = server.seconds
    rate = ask(server.address, paths, connections, seconds)
    cpu = (server.seconds - began) / (rate.per_second * seconds / 1000)
    return Sample([rate.per_second, rate.p50 * 1e6, rate.p99 * 1e6], cpu)


def commits(store: BenchStore) -> Iterator[Figure]:
    """Measure narinfos and 404s while another process commits to the database, as on a machine that builds."""
    if not HAVE["wrk"]:
        return
    paths = [servers.narinfo(info) for info in store.closure]
    absent = [f"/{base32.encode(number.to_bytes(20, 'little'))}.narinfo" for number in range(500)]
    with tempfile.TemporaryDirectory(dir=store.root.parent) as directory:
        database = Path(directory, "db.sqlite")
        shutil.copy(store.database, database)
        with side_by_side(store, ".zst", database=database) as running:
            for name, asked in (("narinfo", paths), ("narinfo, 404", absent)):
                what = f"{name}, 25 connections, {PER_SECOND} commits a second"
                figures = [
                    Figure(what, "requests/s", "nginx", other_at_least=2, work=_REQUESTS),
                    Figure(f"{what}, median", "µs", "nginx"),
                    Figure(f"{what}, 99th percentile", "µs", "nginx"),
                ]
                with subprocess.Popen([sys.executable, "-m", "benchmarks.commits", str(database)]) as writer:
                    try:
                        measure = partial(_asked, paths=asked, connections=25, seconds=store.form.seconds)
                        yield from compare(figures, each(running, measure), store.form.rounds)
                    finally:
                        writer.terminate()


def many_paths(store: BenchStore) -> Iterator[Figure]:
    """Measure narinfos of paths that each are requested for the first time, of a large database."""
    if not HAVE["wrk"]:
        return
    database, _ = _large_database(store)
    asked = [f"/{base32.encode(number.to_bytes(20, 'little'))}.narinfo" for number in range(10, 100_000)]
    random.shuffle(asked)

    def cold(start: Callable[[], AbstractContextManager[Server]]) -> Measure:
        def measure() -> Sample:
            with start() as server:
                return _asked(server, asked, 25, store.form.seconds)

        return measure

    contenders = {HARMONIA: cold(lambda: servers.harmonia(store, database=database))}
    if servers.OTHER:
        contenders[servers.OTHER_NAME] = cold(lambda: servers.other(store, database=database))
    what = "narinfo of a different path each time, 25 connections"
    figures = [
        Figure(what, "requests/s", other_at_least=1, work=_REQUESTS),
        Figure(f"{what}, median", "µs"),
        Figure(f"{what}, 99th percentile", "µs"),
    ]
    yield from compare(figures, contenders, store.form.rounds)


def mixed(store: BenchStore) -> Iterator[Figure]:
    """Measure narinfos and NARs of the closure together, each once, over 25 connections."""

    def measure(server: Server) -> Sample:
        ours = server.name != servers.OTHER_NAME
        nars = [servers.nar(info) + ".zst" if ours else server.nar(info) for info in store.closure]
        paths = [path for info, nar in zip(store.closure, nars, strict=True) for path in (servers.narinfo(info), nar)]
        headers = {} if ours else _ZSTD
        work = store.closure_size / GIB

        def rate() -> Sequence[float]:
            return [store.closure_size / MIB / Downloads(server.address, paths, 25, headers).run()[0]]

        return metered(server, work, rate)

    with side_by_side(store, ".zst") as running:
        measure(running[HARMONIA])
        figure = Figure("narinfos and NARs of the closure, zstd, 25 connections", "MiB/s of NARs", "nginx", work="GiB")
        yield from compare([figure], each(running, measure), store.form.rounds)


def two_workers(store: BenchStore) -> Iterator[Figure]:
    """Measure two serving processes of each server."""
    narinfos, nars = ([make(info) for info in store.closure] for make in (servers.narinfo, servers.nar))
    with side_by_side(store, workers=2) as running:
        if HAVE["wrk"]:
            figure = Figure("2 workers: narinfo, 25 connections", "requests/s", "nginx", work=_REQUESTS)

            def often(server: Server) -> Sample:
                sample = _asked(server, narinfos, 25, store.form.seconds)
                return Sample(sample.values[:1], sample.cpu)

            yield from compare([figure], each(running, often), store.form.rounds)

        def closure(server: Server) -> Sample:
            paths = [server.nar(info) for info in store.closure] if server.name == servers.OTHER_NAME else nars
            work = store.closure_size / GIB
            return metered(
                server,
                work,
                lambda: [store.closure_size / MIB / Downloads(server.address, paths, 16).run()[0]],
            )

        figure = Figure("2 workers: closure, identity, 16 connections", "MiB/s of NARs", "nginx", work="GiB")
        yield from compare([figure], each(running, closure), store.form.rounds)


def closures(store: BenchStore) -> Iterator[Figure]:
    """Measure downloads of the plain NARs of the closure, over 1, 4 and 16 connections."""
    yield from _closures(store, "identity", "", "", {})


def closures_negotiated(store: BenchStore) -> Iterator[Figure]:
    """Measure the same by a client that accepts zstd."""
    yield from _closures(store, "zstd negotiated", ".zst", "", _ZSTD)


def closures_compressed(store: BenchStore) -> Iterator[Figure]:
    """Measure downloads of the files that our narinfos name."""
    yield from _closures(store, ".nar.zst", ".zst", ".zst", {})


def _closures(store: BenchStore, what: str, suffix: str, ending: str, headers: Mapping[str, str]) -> Iterator[Figure]:
    """Measure downloads of the closure from Harmonia with this `ending` and these headers.

    nginx serves copies with `suffix`, and the other server plain NARs, as zstd if `suffix` is not empty.
    """
    paths = [servers.nar(info) + ending for info in store.closure]
    copies = [servers.nar(info) + suffix for info in store.closure]

    def rate(server: Server, connections: int, paths: Sequence[str], headers: Mapping[str, str]) -> Sample:
        def measure() -> Sequence[float]:
            return [store.closure_size / MIB / Downloads(server.address, paths, connections, headers).run()[0]]

        return metered(server, store.closure_size / GIB, measure)

    with side_by_side(store, suffix) as running:
        Downloads(running[HARMONIA].address, paths, 4, headers).run()
        if servers.OTHER:
            named = [running[servers.OTHER_NAME].nar(info) for info in store.closure]
        for connections in (1, 4, 16):

            def measure(server: Server) -> Sample:
                if server.name == servers.OTHER_NAME:  # zstd against zstd
                    return rate(server, connections, named, _ZSTD if suffix else {})  # noqa: B023
                ours = server.name == HARMONIA
                return rate(server, connections, paths if ours else copies, headers if ours else {})  # noqa: B023

            def cold() -> Sample:
                with servers.harmonia(store) as server:
                    return measure(server)

            called = f"closure, {what}, {connections} connections" if connections > 1 else f"closure, {what}"
            if suffix:
                figure = Figure(f"{called}, cold", "MiB/s of NARs", other_at_least=1, work="GiB")
                others = {name: server for name, server in running.items() if name == servers.OTHER_NAME}
                yield from compare([figure], {HARMONIA: cold, **each(others, measure)}, store.form.few_rounds)
                called += ", warm"
            figure = Figure(called, "MiB/s of NARs", "nginx", other_at_least=1, work="GiB")
            figure.at_least = 0.8 if suffix else None
            yield from compare([figure], each(running, measure), store.form.rounds)


def behind_nginx(store: BenchStore) -> Iterator[Figure]:
    """Measure Harmonia behind nginx, which sends files of the cache itself, against nginx alone.

    The processor time is that of Harmonia and nginx together.
    """
    if not HAVE["nginx"]:
        return
    with servers.behind_nginx(store) as front, servers.nginx(servers.copied(store, ".zst")) as alone:
        running = {HARMONIA: front, "nginx": alone}
        closure = [f"{servers.nar(info)}.zst" for info in store.closure]
        large = [front.nar(store.large)]
        for paths in (closure, large, large):  # the second download is verified, and further ones are sent by nginx
            Downloads(front.address, paths).run()
        for name, paths, size in (
            ("closure", closure, store.closure_size),
            ("large file", large, store.large.nar_size),
        ):
            for connections in (1, 4, 16) if paths is closure else (1,):

                def rate(server: Server) -> Sample:
                    downloads = Downloads(server.address, paths, connections)  # noqa: B023 (called in the same iteration)
                    return metered(server, size / GIB, lambda: [size / MIB / downloads.run()[0]])  # noqa: B023

                of = f", {connections} connections" if connections > 1 else ""
                figure = Figure(f"behind nginx: {name}, .nar.zst{of}, warm", "MiB/s of NARs", "nginx", at_least=0.8)
                figure.work = "GiB"
                yield from compare([figure], each(running, rate), store.form.rounds)


def large_file(store: BenchStore) -> Iterator[Figure]:
    """Measure downloads of the NAR of one large file."""
    path, real_path = servers.nar(store.large), store.real_path(store.large)
    size = store.large.nar_size / MIB

    def rate(server: Server, path: str) -> Sample:
        return metered(server, size / 1024, lambda: [size / Downloads(server.address, [path]).run()[0]])

    with ExitStack() as stack:
        running = stack.enter_context(side_by_side(store))
        running["plain socket"] = stack.enter_context(servers.plain_socket(real_path))
        contenders = each(running, lambda server: rate(server, path))
        if servers.OTHER:
            other = running[servers.OTHER_NAME]
            contenders[servers.OTHER_NAME] = lambda: rate(other, other.nar(store.large))
        figure = Figure("large file, identity", "MiB/s", "nginx", at_least=0.8, other_at_least=1, work="GiB")
        yield from compare([figure], contenders, store.form.rounds)

        server = running[HARMONIA]
        last, first = [
            Downloads(server.address, [path] * 20, headers={"Range": f"bytes={position}"}) for position in ("-1", "0-0")
        ]
        figure = Figure("large file, its last byte, compared with its first", "ms", "first byte", at_most=2)
        yield from compare(
            [figure],
            {HARMONIA: lambda: [last.run()[0] * 50], "first byte": lambda: [first.run()[0] * 50]},
            store.form.rounds,
        )

    def cold() -> Sample:
        with servers.harmonia(store) as server:
            return rate(server, f"{path}.zst")

    def piped() -> Sequence[float]:
        return [
            size / _seconds(f"nix-store --dump {real_path} | zstd -{_LEVEL} -T{os.cpu_count()} --stdout > /dev/null")
        ]

    pipe = {"nix-store --dump, zstd": piped} if HAVE["nix-store"] and HAVE["zstd"] else {}
    figure = Figure("large file, .nar.zst, cold", "MiB/s of NAR", "nix-store --dump, zstd", at_least=0.95)
    yield from compare([figure], {HARMONIA: cold, **pipe}, store.form.few_rounds)

    with side_by_side(store, ".zst") as running:
        running.pop(servers.OTHER_NAME, None)
        rate(running[HARMONIA], f"{path}.zst")
        figure = Figure("large file, .nar.zst, warm", "MiB/s of NAR", "nginx", at_least=0.8, work="GiB")
        yield from compare([figure], each(running, lambda server: rate(server, f"{path}.zst")), store.form.rounds)


def many_files(store: BenchStore) -> Iterator[Figure]:
    """Measure NAR and listing of a path of many small files."""
    path, listing = servers.nar(store.many), f"/{store.many.path.hash_part}.ls"

    def ours() -> Sequence[float]:
        """Measure NAR and listing twice, each on a new server."""
        seconds = []
        for asked in (path, listing):
            with servers.harmonia(store) as server:
                seconds += [Downloads(server.address, [asked]).run()[0] for _ in range(2)]
        return seconds

    contenders = {HARMONIA: ours}
    if HAVE["nix-store"]:
        contenders["nix-store --dump"] = lambda: (
            [_seconds(f"nix-store --dump {store.real_path(store.many)} | cat > /dev/null")] * 4
        )
    figures = [
        Figure(f"many small files, {what}", "s", "nix-store --dump", at_most=at_most)
        for what, at_most in (
            ("cold", 1.4),
            ("remembered", 1 / 0.7),
            ("listing, cold", None),
            ("listing, remembered", None),
        )
    ]
    yield from compare(figures, contenders, store.form.rounds)


def nix_copy(store: BenchStore) -> Iterator[Figure]:
    """Measure `nix copy` of the closure into an empty store, and the load of the server."""
    if not HAVE["nix-store"]:
        return

    def measure(server: Server) -> Sequence[float]:
        os.sync()  # so that earlier writes do not delay the measurement
        began = server.seconds
        seconds = _copy(store, server)
        return [seconds, server.seconds - began]

    for suffix, what in ((".zst", ".nar.zst, warm"), ("", "identity")):
        with side_by_side(store, suffix) as running:
            Downloads(running[HARMONIA].address, [servers.nar(info) + suffix for info in store.closure]).run()
            figures = [
                Figure(f"nix copy of the closure, {what}", "s", "nginx"),
                Figure(f"nix copy of the closure, {what}, processor time of the server", "s", "nginx", at_most=2),
            ]
            yield from compare(figures, each(running, measure), store.form.few_rounds)


def _copy(store: BenchStore, server: Server) -> float:
    with tempfile.TemporaryDirectory(dir=store.root.parent) as home:
        settings = "experimental-features = nix-command\nbuild-users-group =\nsandbox = false"
        command = ["nix", "copy", "--no-check-sigs", "--from", server.url, "--to", f"local?root={home}/machine"]
        try:
            return _seconds(
                [*command, f"/nix/store/{store.top.path}"],
                {"HOME": home, "XDG_CACHE_HOME": home, "NIX_CONFIG": settings},
            )
        finally:
            remove_tree(os.fsencode(f"{home}/machine"))


def load(store: BenchStore) -> Iterator[Figure]:
    """Measure narinfos during slow downloads, and the memory of downloads."""
    path = servers.nar(store.large)
    if HAVE["wrk"]:
        paths = [servers.narinfo(info) for info in store.closure]

        def beside(server: Server) -> Sequence[float]:
            nars = [server.nar(store.large) if server.name == servers.OTHER_NAME else path] * _SLOW
            with Downloads(server.address, nars, _SLOW).going_on_slowly():
                return [ask(server.address, paths, 1, store.form.seconds).p99 * 1e3]

        with side_by_side(store) as running:
            figure = Figure(f"narinfo beside {_SLOW} slow downloads, 99th percentile", "ms", at_most=20)
            yield from compare([figure], each(running, beside), store.form.rounds)

    def memory() -> Sequence[float]:
        with servers.harmonia(store, workers=_WORKERS) as server:
            Downloads(server.address, [servers.narinfo(info) for info in store.closure], 4).run()
            idle = [sum(server.memory(what)) / MIB for what in ("Rss", "Pss")]
            most = max(server.memory("Rss")) / MIB
            with Downloads(server.address, [path] * _CONCURRENT, _CONCURRENT).going_on_slowly():
                time.sleep(2)
                busy = [sum(server.memory(what)) / MIB for what in ("Rss", "Pss")]
            return [most, *idle, *busy, (busy[1] - idle[1]) / _CONCURRENT * 1024]

    all_of_it = f"memory of {_WORKERS} workers and the main process"
    figures = [
        Figure("memory of a worker, resident", "MiB", at_most=60),
        Figure(f"{all_of_it}, resident", "MiB"),
        Figure(f"{all_of_it}, what is shared counted once", "MiB"),
        Figure(f"{all_of_it}, with {_CONCURRENT} slow downloads, resident", "MiB"),
        Figure(f"{all_of_it}, with {_CONCURRENT} slow downloads, what is shared counted once", "MiB"),
        Figure("memory of a download", "KiB"),
    ]
    yield from compare(figures, {HARMONIA: memory}, 1)


def start(store: BenchStore) -> Iterator[Figure]:
    """Measure the time from the start to the first responses, one of which needs a lookup in a large database."""
    database, hash_part = _large_database(store)

    def ready() -> Sequence[float]:
        began = time.perf_counter()
        with servers.harmonia(store, database=database) as server:
            answers = time.perf_counter() - began
            server.get(f"/{hash_part}.narinfo")
            return [answers, time.perf_counter() - began]

    what = f"start with {store.form.valid_paths:,} paths"
    figures = [
        Figure(f"{what}, until it answers", "s", at_most=1),
        Figure(f"{what}, until it has answered a narinfo", "s"),
    ]
    yield from compare(figures, {HARMONIA: ready}, store.form.rounds)


def _large_database(store: BenchStore) -> tuple[Path, str]:
    """Return a large database, without the paths on disk, and the hash part of one of its paths."""
    root = store.root.parent / f"database-{store.form.valid_paths}"
    hash_parts = (base32.encode(number.to_bytes(20, "little")) for number in range(store.form.valid_paths))
    rows = (
        (f"/nix/store/{hash_part}-path", f"sha256:{hash_part.encode().hex():0>64}", 1, 1000) for hash_part in hash_parts
    )
    if not root.exists():
        print(f"creating a database of {store.form.valid_paths:,} paths", flush=True)
        unfinished = root.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        with StoreBuilder(unfinished).connect() as connection:
            connection.executemany(
                "insert into ValidPaths (path, hash, registrationTime, narSize) values (?, ?, ?, ?)", rows
            )
            # Each path refers to the ten before it.
            connection.execute(
                "insert into Refs select later.id, earlier.id from ValidPaths as later join ValidPaths as earlier"
                " on earlier.id between later.id - 10 and later.id - 1"
            )
        unfinished.rename(root)
    return root / "nix/var/nix/db/db.sqlite", base32.encode((store.form.valid_paths // 2).to_bytes(20, "little"))


def prices(store: BenchStore) -> Iterator[Figure]:
    """Measure the CPU time that metrics, access log and other conveniences add to a request."""
    metrics = Metrics(("narinfo",), (), 1)
    route = metrics.own.routes["narinfo"]
    rounds = timeit.repeat(lambda: route.count(200, Outcome.MEMORY, 1000, 0.001, None), number=10_000, repeat=5)
    seconds = min(rounds) / 10_000
    yield from compare(
        [Figure("price of counting a request for the metrics", "µs")], {HARMONIA: lambda: [seconds * 1e6]}, 1
    )
    if not HAVE["wrk"]:
        return
    asked = [servers.narinfo(info) for info in store.closure]
    small = [servers.nar(min(store.closure, key=lambda info: info.nar_size))]

    def price(paths: Sequence[str], settings: str = "", *, accept: str = "", numbered: bool = False) -> Measure:
        headers = {"Accept-Encoding": accept} if accept else {}

        def measure() -> Sequence[float]:
            with servers.harmonia(store, f"nar_compression = 'none'\n{settings}") as server:
                ask(server.address, paths, 1, 1, headers)
                began = server.seconds
                rate = ask(server.address, paths, 25, store.form.seconds, headers, numbered=numbered)
                return [(server.seconds - began) / (rate.per_second * store.form.seconds) * 1e6]

        return measure

    for what, measure in {
        "narinfo, asked for again in the same words": price(asked),
        "narinfo, in other words each time": price(asked, numbered=True),
        "narinfo, the same with the access log": price(asked, "access_log = true"),
        "small NAR": price(small),
        "small NAR, with an Accept-Encoding to look at": price(small, accept="br, gzip;q=0.8, zstd;q=0, identity"),
    }.items():
        yield from compare([Figure(f"price of a request: {what}", "µs")], {HARMONIA: measure}, store.form.few_rounds)


def _seconds(command: str | Sequence[str], environment: Mapping[str, str] | None = None) -> float:
    began = time.perf_counter()
    environment = {**os.environ, **(environment or {})}
    subprocess.run(command, check=True, shell=isinstance(command, str), env=environment, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


ALL = (
    narinfos,
    commits,
    many_paths,
    closures,
    closures_negotiated,
    closures_compressed,
    mixed,
    two_workers,
    large_file,
    behind_nginx,
    many_files,
    nix_copy,
    load,
    start,
    prices,
)
