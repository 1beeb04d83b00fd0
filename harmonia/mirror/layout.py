"""Keys of a plain Nix binary cache in a bucket, and the text of its small objects (Nix `binary-cache-store.cc`)."""

from harmonia.nix.store_path import StorePath

CACHE_INFO = "nix-cache-info"
CACHE_INFO_TYPE = "text/x-nix-cache-info"
NAR_TYPE = "application/x-nix-nar"
JSON_TYPE = "application/json"
LOG_TYPE = "text/plain; charset=utf-8"


def cache_info(store_dir: str, priority: int) -> bytes:
    return f"StoreDir: {store_dir}\nWantMassQuery: 1\nPriority: {priority}\n".encode()


OWN = "harmonia/"
"""The folder of our own objects, which no client reads."""
COLLECTION = f"{OWN}collection"
"""The state of the last garbage collection."""


ROOTS = f"{OWN}roots/"
UNUSED = f"{OWN}unused/"


def root_key(path: StorePath) -> str:
    """Return the key of the object that makes a path a root of the bucket's garbage collection."""
    return f"{ROOTS}{path}"


def unused_key(nar_url: str) -> str:
    """Return the key of the object whose age is the time for which no narinfo has named a NAR."""
    return f"{UNUSED}{nar_url}"


def narinfo_key(path: StorePath) -> str:
    return f"{path.hash_part}.narinfo"


def listing_key(path: StorePath) -> str:
    return f"{path.hash_part}.ls"


def log_key(derivation: StorePath) -> str:
    return f"log/{derivation}"


def debuginfo_key(build_id: str) -> str:
    return f"debuginfo/{build_id}.debug"


def realisation_key(derivation_hash: str, output: str) -> str:
    return f"realisations/{derivation_hash}!{output}.doi"


def build_trace_key(derivation: str, output: str) -> str:
    return f"build-trace-v2/{derivation}/{output}.doi"
