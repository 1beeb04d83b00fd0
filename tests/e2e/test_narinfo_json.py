"""`/<hash>.narinfo?json` equals the JSON that Nix makes of the narinfo."""

import json
from collections.abc import Callable
from typing import Any

from support.closure import Closure
from support.nix_client import Client
from support.running import Server

Start = Callable[..., Server]


def told_by(client: Client, server: Server, path: str, *options: str) -> Any:
    return json.loads(client.run("nix", "path-info", "--json", *options, "--store", server.url, path).stdout)


def as_version_1(told: dict[str, Any]) -> dict[str, Any]:
    """Convert our JSON to that of `nix path-info`: full paths, and signatures as single words."""
    full = f"{told['storeDir']}/".__add__
    return told | {
        "version": 1,
        "path": full(told["path"]),
        "references": [full(reference) for reference in told["references"]],
        "deriver": told["deriver"] and full(told["deriver"]),
        "signatures": [f"{sig['keyName']}:{sig['sig']}" for sig in told["signatures"]],
    }


def test_json_equals_that_of_nix_path_info(start: Start, client: Client, closure: Closure) -> None:
    server = start(store=closure.server.directory, settings=f"sign_key_paths = ['{closure.key.secret_file}']")
    newest = client.nix.version >= (2, 33)
    for path in (closure.paths[name] for name in ("top-1.0", "added-1.0", "flat-1.0")):
        hash_part = path.removeprefix("/nix/store/")[:32]
        assert server.get(f"/nar/{hash_part}.nar.zst").status == 200  # from now on, the narinfo has its size
        ours = json.loads(server.get(f"/{hash_part}.narinfo?json").body)
        theirs = told_by(client, server, path, *(["--json-format", "1"] if newest else []))
        # Up to Nix 2.18, it is a list without missing paths.
        theirs = theirs[0] if isinstance(theirs, list) else {"path": path, **theirs[path]}
        ca = theirs.pop("ca", None)
        assert (ca is None) == (ours["ca"] is None)
        assert theirs.items() <= as_version_1(ours).items()
        assert {"narHash", "narSize", "references", "signatures", "url"} <= theirs.keys()
        if newest:
            structured = told_by(client, server, path, "--json-format", "2")["info"][path.removeprefix("/nix/store/")]
            del structured["version"], structured["signatures"]
            assert structured.items() <= ours.items()
            assert ours.keys() - structured.keys() == {"version", "signatures", "path"}
