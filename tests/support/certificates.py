"""Certificates, made by the openssl program."""

import subprocess
from pathlib import Path


def openssl(directory: Path, command: str) -> None:
    subprocess.run(["openssl", *command.split()], cwd=directory, capture_output=True, check=True)


def authority(directory: Path, name: str) -> None:
    """Create a CA in `directory`: `<name>.pem` and `<name>.key`."""
    made = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    openssl(directory, f"{made} -subj /CN={name} -keyout {name}.key -out {name}.pem")


def issue(directory: Path, by: str, name: str, days: int = 2) -> Path:
    """Issue a certificate; return a file with the certificate and its key."""
    request = f"req -new -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN={name} -keyout {name}.key"
    openssl(directory, f"{request} -out {name}.csr")
    openssl(
        directory, f"x509 -req -in {name}.csr -CA {by}.pem -CAkey {by}.key -CAcreateserial -days {days} -out {name}.crt"
    )
    both = directory / f"{name}.both"
    both.write_text((directory / f"{name}.crt").read_text() + (directory / f"{name}.key").read_text())
    return both
