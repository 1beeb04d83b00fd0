"""A real S3 service: one SeaweedFS process for all tests of a run, each with a folder of its own in a bucket."""

import fcntl
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp

import obstore
import pytest
from obstore.store import S3Store

from harmonia.nix import narinfo
from harmonia.nix.narinfo import NarFile
from harmonia.nix.path_info import PathInfo
from support.ports import ReservedPort

_ACCESS, _SECRET = "testtest", "testtestsecret"
_READER = "readonly", "readonlysecret"
_IDENTITIES = {
    "identities": [
        {
            "name": "writer",
            "credentials": [{"accessKey": _ACCESS, "secretKey": _SECRET}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        },
        {
            "name": "reader",
            "credentials": [{"accessKey": _READER[0], "secretKey": _READER[1]}],
            "actions": ["Read", "List"],
        },
        {"name": "anonymous", "actions": ["Read:public"]},
    ]
}
_GRPC_OFFSET = 10_000  # SeaweedFS also listens at each of its ports plus this
_PATIENCE_S = 120.0


class S3:
    """A running service with the buckets `public`, which anyone may read, and `private`."""

    def __init__(self, url: str) -> None:
        self.url = url

    def store(self, bucket: str) -> S3Store:
        return S3Store(
            bucket,
            endpoint=self.url,
            access_key_id=_ACCESS,
            secret_access_key=_SECRET,
            region="us-east-1",
            client_options={"allow_http": True},
        )

    def folder(self, directory: Path, bucket: str = "public") -> "Folder":
        """Return an empty folder in a bucket. Its credentials are files in `directory`."""
        return Folder(self, directory, bucket, hashlib.sha256(os.fsencode(directory)).hexdigest()[:16])


class S3Service(S3):
    """The process of a service."""

    def __init__(self, directory: Path) -> None:
        environments = (Path(sys.prefix), Path(__file__).parents[2] / ".venv")
        programs = [path for path in (environment / "bin/weed" for environment in environments) if path.exists()]
        if not programs:
            pytest.skip("no SeaweedFS in .venv: make seaweedfs")
        self._program = programs[0]
        self._directory = directory
        (directory / "data").mkdir()
        (directory / "s3.json").write_text(json.dumps(_IDENTITIES))
        self.process: subprocess.Popen[bytes]
        self._reserved = ExitStack()
        self._ports = self._reserve(4)
        super().__init__(f"http://127.0.0.1:{self._ports[3]}")

    def _reserve(self, count: int) -> list[int]:
        """Return ports that are reserved together with those of gRPC, until `close`."""
        chosen: list[int] = []
        while len(chosen) < count:
            port = random.SystemRandom().randrange(20_000, 32_000)
            with ExitStack() as pair, suppress(OSError):
                for each in (port, port + _GRPC_OFFSET):
                    pair.enter_context(ReservedPort(each))
                self._reserved.enter_context(pair.pop_all())
                chosen.append(port)
        return chosen

    def launch(self) -> "subprocess.Popen[bytes]":
        """Start the process, without waiting for success."""
        master, volume, filer, s3 = self._ports
        with (self._directory / "log").open("ab") as log:
            return subprocess.Popen(
                [
                    *(self._program, "server", f"-dir={self._directory}/data", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
                    *("-master.telemetry=false", f"-master.port={master}", f"-volume.port={volume}", "-volume.max=0"),
                    *("-master.volumeSizeLimitMB=64", "-filer", f"-filer.port={filer}", "-s3", f"-s3.port={s3}"),
                    *(f"-s3.config={self._directory}/s3.json", "-s3.port.iceberg=0", "-s3.port.lance=0"),
                ],
                stdout=log,
                stderr=log,
                cwd=self._directory,
            )

    def start(self) -> None:
        self.process = self.launch()
        deadline = time.monotonic() + _PATIENCE_S
        while not self._is_ready():
            assert time.monotonic() < deadline, self.log()
            assert self.process.poll() is None, self.log()
            time.sleep(0.1)
        for bucket in ("public", "private"):
            obstore.put(self.store(bucket), ".bucket", b"")  # SeaweedFS creates a bucket at its first object

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/healthz", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def log(self) -> str:
        """Return the end of the log."""
        return (self._directory / "log").read_text()[-2000:]

    def stop(self, number: signal.Signals = signal.SIGKILL) -> None:
        self.process.send_signal(number)
        self.process.wait(_PATIENCE_S)

    def close(self) -> None:
        """Stop for good."""
        self.stop()
        self._reserved.close()


@contextmanager
def shared(directory: Path) -> Iterator[S3]:
    """Yield the service that all processes of a run with the same directory use. The first one starts and stops it."""
    address = directory / "s3.url"
    with open(directory / "s3.start", "w") as starting, open(directory / "s3.users", "w") as users:
        fcntl.flock(starting, fcntl.LOCK_EX)
        fcntl.flock(users, fcntl.LOCK_SH)
        if address.exists():
            fcntl.flock(starting, fcntl.LOCK_UN)
            yield S3(address.read_text())
            return
        service = S3Service(Path(mkdtemp(prefix="s3-", dir=directory)))
        try:
            service.start()
            address.write_text(service.url)
            fcntl.flock(starting, fcntl.LOCK_UN)
            yield service
            fcntl.flock(starting, fcntl.LOCK_EX)  # nobody else begins to use it
            address.unlink()
            fcntl.flock(users, fcntl.LOCK_EX)  # wait until the others have ended
        finally:
            service.close()


@dataclass
class Folder:
    """A folder of a bucket, in which a test has its mirror."""

    service: S3
    directory: Path
    bucket: str
    prefix: str
    endpoint: str = field(init=False)

    def __post_init__(self) -> None:
        self.endpoint = self.service.url
        for name, pair in (("writer", (_ACCESS, _SECRET)), ("reader", _READER), ("wrong", (_ACCESS, "s3cr3t"))):
            file = self.directory / f"{name}.s3"
            file.write_text(":".join(pair) + "\n")
            file.chmod(0o600)

    def settings(self, more: str = "", *, who: str | None = "writer") -> str:
        """Return the table [mirror], with the credentials of `who`: writer, reader, wrong or None."""
        lines = [f"bucket = '{self.bucket}'", f"prefix = '{self.prefix}'", f"endpoint = '{self.endpoint}'"]
        if who is not None:
            lines.append(f"credentials_file = '{self.directory}/{who}.s3'")
        return "\n".join(("[mirror]", *lines, more, ""))

    @property
    def url(self) -> str:
        return f"{self.service.url}/{self.bucket}/{self.prefix}"

    @property
    def store(self) -> S3Store:
        return self.service.store(self.bucket)

    def objects(self) -> dict[str, int]:
        """Return the size of each object by its key."""
        listed = obstore.list(self.store, f"{self.prefix}/").collect()
        return {each["path"][len(self.prefix) + 1 :]: each["size"] for each in listed}

    def get(self, key: str) -> bytes:
        return bytes(obstore.get(self.store, f"{self.prefix}/{key}").bytes())

    def put(self, key: str, content: bytes) -> None:
        obstore.put(self.store, f"{self.prefix}/{key}", content)

    def delete(self, key: str) -> None:
        obstore.delete(self.store, f"{self.prefix}/{key}")

    def paths(self) -> dict[str, tuple[PathInfo, NarFile]]:
        """Return the parsed narinfos by hash part, without those that are deleted meanwhile.

        The service may execute the last request of a killed process after that process has ended.
        """
        found = {}
        for key in self.objects():
            if key.endswith(".narinfo"):
                with suppress(FileNotFoundError):
                    found[key.removesuffix(".narinfo")] = narinfo.parse(self.get(key).decode(), "/nix/store")
        return found

    def check_closed(self) -> None:
        """Fail unless each narinfo has its NAR, with the right size, and the narinfos of its references."""
        objects, paths = self.objects(), self.paths()
        for info, nar in paths.values():
            assert objects.get(nar.url) == nar.file_size, info.path
            assert {reference.hash_part for reference in info.references} <= paths.keys(), info.path
