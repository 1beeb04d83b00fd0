"""`/sbom/<hash>`: the software bill of materials of a closure, in CycloneDX 1.6 (ECMA-424). Only if `browse` is set.

Each path is a component with its name and version, and the NAR hash as a property, because CycloneDX knows only hashes
of files. Licences and vulnerabilities are not in the store's database.
"""

import json
import uuid
from collections import defaultdict
from typing import Any

from sanic import Request
from sanic.exceptions import NotFound

from harmonia import __version__
from harmonia.nix.package_name import PackageName
from harmonia.nix.path_info import PathInfo
from harmonia.server import page
from harmonia.server.context import ServerContext
from harmonia.server.http.response import Representation
from harmonia.server.resources.nar import require_info
from harmonia.store import packages, queries
from harmonia.store.packages import Member
from harmonia.store.store import Store

_CONTENT_TYPE = "application/vnd.cyclonedx+json; version=1.6"


async def get(context: ServerContext, _: Request, hash_part: str) -> Representation:
    if not context.settings.browse:
        raise NotFound
    info = require_info(await context.paths.lookup_path(hash_part))

    def make(store: Store) -> bytes:
        members = packages.members(store, info.path, context.paths.publish_filter(store))
        references = queries.closure_references(store, info.path, packages.MAX_PATHS)
        return json.dumps(render(info, store.store_dir, members, references), indent=1).encode() + b"\n"

    disposition = {"content-disposition": f'inline; filename="{info.path.name}.cdx.json"'}
    return page.of_text(context, _CONTENT_TYPE, await context.threads.run_slow_db(make), disposition)


def render(info: PathInfo, store_dir: str, members: list[Member], references: list[tuple[int, int]]) -> dict[str, Any]:
    """Return the document. `references` has the numbers of referrer and reference of the `members`."""
    by_number = {member.number: f"{store_dir}/{member.path}" for member in members}
    needed: defaultdict[str, list[str]] = defaultdict(list)
    for referrer, reference in references:
        if referrer in by_number and reference in by_number:
            needed[by_number[referrer]].append(by_number[reference])
    components = {path: _component(store_dir, member) for path, member in zip(by_number.values(), members, strict=True)}
    root = f"{store_dir}/{info.path}"
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, root)}",
        "version": 1,
        "metadata": {
            "tools": {"components": [{"type": "application", "name": "harmonia", "version": __version__}]},
            "component": components.pop(root),
        },
        "components": list(components.values()),
        "dependencies": [{"ref": path, "dependsOn": sorted(needed[path])} for path in by_number.values()],
    }


def _component(store_dir: str, member: Member) -> dict[str, Any]:
    package = PackageName.parse(member.path.name)
    return {
        "type": "library",
        "bom-ref": f"{store_dir}/{member.path}",
        "name": package.name,
        **({"version": package.version} if package.version else {}),
        "properties": [
            {"name": "nix:store_path", "value": f"{store_dir}/{member.path}"},
            {"name": "nix:nar_hash", "value": member.nar_hash},
            {"name": "nix:nar_size", "value": str(member.nar_size)},
        ],
    }
