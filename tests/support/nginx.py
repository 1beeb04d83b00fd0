"""A real nginx, as a proxy or a file server."""

import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from support.ports import ReservedPort
from support.running import wait_until


@contextmanager
def nginx(directory: Path, server: str, http: str = "", *, port: int = 0) -> Iterator[tuple[str, Path]]:
    """Run nginx with these lines in its only `server`, and `http` around it; yield its URL and its access log.

    `port` is a reserved port, for a test that must know that nobody else gets it after the end.
    """
    program = shutil.which("nginx") or "/usr/sbin/nginx"
    if not Path(program).exists():
        pytest.skip("no nginx on this machine: apt-get install nginx-light")
    with ExitStack() as stack:
        port = port or stack.enter_context(ReservedPort()).number
        directory.mkdir()
        log = directory / "access.log"
        (directory / "nginx.conf").write_text(
            f"""
            daemon off; pid {directory}/pid; error_log {directory}/error.log; user root;
            events {{}}
            http {{
              access_log {log}; sendfile on;
              client_body_temp_path {directory}; proxy_temp_path {directory}; fastcgi_temp_path {directory};
              uwsgi_temp_path {directory}; scgi_temp_path {directory};
              {http}
              server {{ listen 127.0.0.1:{port}; {server} }}
            }}
            """
        )
        process = subprocess.Popen([program, "-e", directory / "error.log", "-c", directory / "nginx.conf"])
        try:
            wait_until(lambda: _listens(port))
            yield f"http://127.0.0.1:{port}", log
        finally:
            process.terminate()
            process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0
