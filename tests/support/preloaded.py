"""A fork server: forks Harmonia from a process that has imported it, which saves most of the CPU time of a start.

The result is a process like that of `python -m harmonia`: our child, with the same arguments, environment, working
directory, descriptors, signals and exit status. Only `/proc` shows the command line and environment of the fork server.
As a program, this module is the fork server.
"""

import asyncio
import atexit
import ctypes
import fcntl
import gc
import inspect
import json
import os
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FunctionType
from typing import Any
from unittest.mock import patch

from sanic import Sanic, signals
from sanic.touchup import TouchUp
from sanic.touchup import service as touchup
from sanic.touchup.schemes import BaseScheme
from sanic_routing import BaseRouter, route, router
from sanic_routing.utils import path_to_parts

import harmonia
from harmonia.config import credentials
from harmonia.config.settings import Settings
from harmonia.server.app import create_app, create_metrics
from harmonia.server.context import ServerContext

HARMONIA = [sys.executable, "-m", "harmonia"]
PATCHED = [sys.executable, "-c"]
"""The beginning of a command that changes Harmonia, then runs it."""
NOT_PRELOADED = ["env", *HARMONIA]
"""Harmonia in a new process that does its own imports."""
_AT_START = ("PYTHON", "LD_", "MALLOC_", "GLIBC_", "LC_", "LANG", "OPENSSL_", "SSL_CERT_")
"""Prefixes of environment variables that are read only once, before a program begins or when it imports."""
_MESSAGE_MAX_BYTES = 1 << 18
_MAX_DESCRIPTORS = 16
_PR_SET_CHILD_SUBREAPER = 36


def popen(command: Sequence[str], *, env: Mapping[str, str], **options: object) -> subprocess.Popen[Any]:
    """Start a command. Use the fork server if the command is Harmonia and no option needs a new program."""
    simple = options.keys() <= {"cwd", "pass_fds", "start_new_session", "stdin", "stdout", "stderr", "text"}
    ours = list(command[:3]) == HARMONIA or list(command[:2]) == PATCHED
    if simple and ours and _at_start(env) == _at_start(_ENVIRONMENT):
        return _Forked(command, env=env, **options)  # type: ignore[call-overload, no-any-return]
    return subprocess.Popen(command, env=env, **options)  # type: ignore[call-overload, no-any-return]


def _at_start(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(_AT_START)}


_ENVIRONMENT = dict(os.environ)


class _ForkServer:
    """Our end of the fork server: one for each pytest process, started on first use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            number = theirs.fileno()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.preloaded", str(number)],
                cwd=Path(__file__).parents[2],  # the tests import harmonia from here, too
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=_ENVIRONMENT,
                pass_fds=[number],
            )
        atexit.register(self._end)

    def _end(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._process.wait()

    def fork(self, request: Mapping[str, object], descriptors: Sequence[int]) -> int:
        """Return the process id of a child of ours that executes the request."""
        message = json.dumps(request).encode()
        with self._lock:
            # Its parent ends at once, so it becomes a child of the nearest ancestor that adopts orphans.
            _adopt_orphans(yes=True)
            try:
                socket.send_fds(self._socket, [message], list(descriptors))
                pid = self._socket.recv(64)
            finally:
                _adopt_orphans(yes=False)
        if not pid:
            raise ChildProcessError(f"the fork server ended with status {self._process.wait()}")
        return int(pid)


_fork_server = cache(_ForkServer)


def _adopt_orphans(*, yes: bool) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(yes), *[ctypes.c_ulong(0)] * 3):
        raise OSError(ctypes.get_errno(), "prctl")


class _Forked(subprocess.Popen[Any]):
    """A process that the fork server starts, with the pipes and `wait` of `subprocess`."""

    def _execute_child(self, *arguments: object) -> None:
        execute = inspect.signature(subprocess.Popen._execute_child)  # type: ignore[attr-defined]  # noqa: SLF001 (a private part is tested)
        bound = execute.bind(self, *arguments).arguments
        request = {
            "program": bound["args"][1:3],
            "arguments": bound["args"][3:],
            "environment": dict(bound["env"]),
            "directory": str(bound["cwd"] or os.getcwd()),
            "session": bound["start_new_session"],
            "passed": bound["pass_fds"],
        }
        ends = [bound["p2cread"], bound["c2pwrite"], bound["errwrite"]]
        given = [own if end == -1 else end for own, end in enumerate(ends)]
        self.pid = _fork_server().fork(request, [*given, *bound["pass_fds"]])
        self._child_created = True
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*[bound[name] for name in pipes])  # type: ignore[attr-defined]


def _serve(connection: socket.socket) -> list[str] | None:
    """Fork for each request until the other end closes. Return the program in each fork, and None at the end."""
    for module in pkgutil.walk_packages(harmonia.__path__, "harmonia."):
        if module.name != "harmonia.__main__":
            import_module(module.name)
    _compile_for_sanic()
    credentials.system_tls()
    "localhost".encode("idna")  # `getaddrinfo` imports this codec
    assert len(os.listdir("/proc/self/task")) == 1, "no thread survives a fork"
    gc.collect()
    gc.freeze()  # otherwise each fork copies and frees all of this memory when it ends
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, which ends this process
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, _MESSAGE_MAX_BYTES, _MAX_DESCRIPTORS)
        if not message:
            return None
        reading, writing = os.pipe()
        parent = os.fork()
        if parent == 0:
            pid = os.fork()
            if pid == 0:
                connection.close()
                request = json.loads(message)
                _become(request, descriptors)
                return request["program"]  # type: ignore[no-any-return]
            os.write(writing, b"%d" % pid)
            os._exit(0)
        os.close(writing)
        os.waitpid(parent, 0)
        with open(reading, "rb") as pipe:
            connection.send(pipe.read())  # the pipe ends when the fork has become a new process
        for descriptor in descriptors:
            os.close(descriptor)


def _compile_for_sanic() -> None:
    """Compile what Sanic compiles at each start, so that no fork has to: that is half of a start."""
    build = _compile_methods_once()
    _compile_routes_once()
    with TemporaryDirectory() as directory:
        settings = Settings(cache_dir=directory, real_nix_store=directory, nix_db_path=f"{directory}/none")
        app = create_app(ServerContext(settings, [], create_metrics(settings)))

        async def finalize() -> None:
            app.signalize()
            app.finalize()

        asyncio.run(finalize())
        for target, name in TouchUp._registry:  # noqa: SLF001 (a private part is tested)
            build(getattr(target, name), dict(inspect.getmembers(inspect.getmodule(target))), app)
    Sanic.unregister_app(app)


def _compile_methods_once() -> Callable[..., FunctionType]:
    """Let Sanic change a method only once for apps with the same signals. Return the function that changes it."""
    compiled: dict[tuple[object, ...], FunctionType] = {}
    build: Callable[..., FunctionType] = BaseScheme.build

    def build_once(method: FunctionType, module_globals: dict[str, object], app: "Sanic[Any, Any]") -> FunctionType:
        signals = frozenset(each.name for each in app.signal_router.routes)
        key = method, signals, frozenset(info.settings["version"] for info in app.state.server_info)
        if key not in compiled:
            compiled[key] = build(method, module_globals, app)
        made = compiled[key]
        copy = FunctionType(made.__code__, module_globals, made.__name__, made.__defaults__)
        copy.__kwdefaults__ = made.__kwdefaults__
        return copy

    patch.object(BaseScheme, "build", staticmethod(build_once)).start()
    patch.object(touchup, "getmembers", lambda module: vars(module).items()).start()  # the same, without sorting
    return build_once


def _compile_routes_once() -> None:
    """Let the router compile the same source only once, and without a copy for people to read."""
    render: Any = BaseRouter._render  # noqa: SLF001 (a private part is tested)
    compile_once = cache(lambda source: compile(source, "", "exec"))

    def render_once(self: BaseRouter, *_: bool) -> None:
        render(self, do_compile=False)
        made: dict[str, Any] = {}
        exec(compile_once(self.find_route_src), render.__globals__, made)
        self._find_route, self._matchers = made["find_route"], made.get("matchers")

    patch.object(BaseRouter, "_render", render_once).start()
    split = cache(path_to_parts)
    for module in (route, router, signals):
        patch.object(module, "path_to_parts", split).start()


def _become(request: Mapping[str, Any], descriptors: Sequence[int]) -> None:
    """Turn this process into a new process with the arguments of the request."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    numbers = [0, 1, 2, *request["passed"]]
    free = max(*numbers, *descriptors) + 1
    copies = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, free) for descriptor in descriptors]
    for copy, number in zip(copies, numbers, strict=True):
        os.dup2(copy, number)
    for descriptor in {int(each) for each in os.listdir("/proc/self/fd")} - set(numbers):
        with suppress(OSError):  # the descriptor of the list itself
            os.close(descriptor)
    os.chdir(request["directory"])
    if request["session"]:
        os.setsid()
    os.environ.clear()
    os.environ.update(request["environment"])
    time.tzset()
    sys.argv[:] = ["-c", *request["arguments"]]
    sys.path[0] = request["directory"]


def _run(program: Sequence[str]) -> None:
    """Run a program as `python` does, and end this process."""
    try:
        match program:
            case ["-m", module]:
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            case ["-c", text]:
                exec(text, {"__name__": "__main__"})
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            raise
        status = end.code or 0
    else:
        status = 0
    # Do what Python does at its end, except freeing memory: that would take most of the time of a short program,
    # because memory shared with the fork server is copied before it is freed.
    threading._shutdown()  # type: ignore[attr-defined]  # noqa: SLF001 (a private part is tested)
    atexit._run_exitfuncs()  # noqa: SLF001 (a private part is tested)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__" and (_program := _serve(socket.socket(fileno=int(sys.argv[1])))):
    _run(_program)
