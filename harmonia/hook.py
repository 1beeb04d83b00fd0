"""Post-build hook of Nix: hands the outputs of a build to `harmonia watch`, over its unix socket.

A failure of a hook would end the build, so this always succeeds, within a second. It imports only what it needs,
because builds wait for it (Nix up to 2.34).
"""

import os
import socket
import sys
from contextlib import suppress

DEFAULT_SOCKET = "/run/harmonia-watch/socket"
_TIMEOUT_S = 0.25  # to connect, and again to send


def main() -> None:
    """Send `$OUT_PATHS` to the socket in the first argument, `$HARMONIA_WATCH_SOCKET`, or the default."""
    address = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("HARMONIA_WATCH_SOCKET") or DEFAULT_SOCKET
    try:
        with socket.socket(socket.AF_UNIX) as watcher:
            watcher.settimeout(_TIMEOUT_S)
            watcher.connect(address)
            # Nix 2.8.0 leaves OUT_PATHS empty; the watcher finds the outputs of a derivation.
            built = os.environ.get("OUT_PATHS") or os.environ.get("DRV_PATH", "")
            watcher.sendall(built.encode(errors="replace"))
    except OSError as error:
        with suppress(OSError):
            sys.stderr.write(f"harmonia-hook: {address}: {error}; build results are not handed over\n")


if __name__ == "__main__":
    main()
