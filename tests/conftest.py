"""Fixtures and hooks for all tests. Tests of the server use a real process, a real socket, and a store of their own."""

import gc
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis.strategies import none

from support.ports import ReservedPort
from support.programs import NOT_ROOT, namespaces_forbidden, require, skips
from support.running import Server
from support.s3_service import S3, Folder, shared

# Each run has the same examples, so more of them are for `make test-slow`.
settings.register_profile("default", deadline=None, derandomize=True, print_blob=True, max_examples=25)
settings.register_profile("few", settings.get_profile("default"), max_examples=10)
settings.register_profile("many", settings.get_profile("default"), max_examples=300)
settings.load_profile("default")

# A shell script starts background commands with SIGINT ignored, and nohup with SIGHUP ignored. All our child processes
# would inherit that.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Use three workers for two CPUs, because many tests wait for servers, clients or timeouts."""
    return (len(os.sched_getaffinity(0)) * 3 + 1) // 2


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run slow tests, and tests with newer versions of Nix")


gc.disable()  # what is imported and collected stays until the end, so a search for garbage would be in vain


def pytest_collection() -> None:
    """Run a first example: Hypothesis then looks for the owner of its random numbers, fast until tests are imported."""
    given(none())(lambda _: None)()  # `gc.freeze` would hide the owner from older Hypothesis


def pytest_collection_finish() -> None:
    """Exclude all modules and tests from garbage collection: later collections take a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip the test if something that its marker needs is missing."""
    if not item.config.getoption("slow") and any(map(item.get_closest_marker, ("slow", "newer_nix"))):
        pytest.skip("slow or with a newer Nix: make test-slow")
    if item.get_closest_marker("nix"):
        require("nix-store")
    if item.get_closest_marker("root"):
        require("mount")
        if reason := NOT_ROOT if os.geteuid() != 0 else namespaces_forbidden():
            pytest.skip(reason)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Count the skipped tests in one line."""
    skipped = terminalreporter.stats.get("skipped", [])
    if skipped:
        reasons = Counter(str(each.longrepr[2]).removeprefix("Skipped: ") for each in skipped)
        terminalreporter.write_line(skips(reasons), yellow=True)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Return a function that starts servers, and stop them at the end of the test."""
    started: list[Server] = []

    def start(**options: object) -> Server:
        server = Server(tmp_path / f"server-{len(started)}", **options)  # type: ignore[arg-type]
        started.append(server)
        server.start()
        return server

    yield start
    for server in started:
        server.stop()


@pytest.fixture
def new_port() -> Iterator[Callable[[], int]]:
    """Return a function that reserves a port until the end of the test."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(ReservedPort()).number


@pytest.fixture(scope="session")
def s3_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """Use SeaweedFS, one for all processes of pytest-xdist."""
    own = tmp_path_factory.getbasetemp()
    with shared(own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) as service:
        yield service


@pytest.fixture
def folder(s3_service: S3, tmp_path: Path) -> Folder:
    """Return an empty folder in a bucket that anyone may read."""
    return s3_service.folder(tmp_path)


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """Fail the test that lets SIGPIPE kill this process, instead of a later test that writes to a closed socket."""
    yield
    assert signal.getsignal(signal.SIGPIPE) is signal.SIG_IGN


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove settings of the developer's environment."""
    prefixes = ("NIX_", "SIGN_KEY", "CONFIG_FILE", "LISTEN_", "NOTIFY_")
    for name in [name for name in os.environ if name.startswith(prefixes) or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("harmonia.config.loader.SYSTEM_FILE", "/nonexistent/harmonia.toml")
