"""`[mirror]`: bucket of an S3 service."""

from typing import Annotated

import msgspec
from msgspec import Meta

from harmonia.config import value_types
from harmonia.config.tables.upstream import Upstream
from harmonia.config.value_types import File, Seconds, Url
from harmonia.config.wrong_setting import WrongSettingError, check_values


class Mirror(msgspec.Struct, frozen=True, kw_only=True):
    """A bucket of an S3 service that has a plain Nix binary cache, shared by several servers."""

    bucket: Annotated[
        str | None,
        Meta(
            description="Name of the bucket. `harmonia mirror` writes store paths to it. Needs `endpoint`, and the"
            " Python package obstore (`harmonia[s3]`)."
        ),
    ] = None
    endpoint: Annotated[
        Url | None,
        Meta(description="URL of the S3 service. The bucket's name follows it as the first part of the path."),
    ] = None
    region: Annotated[str, Meta(description="Region of the S3 service, for signatures.")] = "us-east-1"
    prefix: Annotated[str, Meta(description="Folder of the cache in the bucket. Default: the whole bucket.")] = ""
    credentials_file: Annotated[
        File | None,
        Meta(
            description="File with `ACCESS_KEY_ID:SECRET_ACCESS_KEY`. Without it, requests are anonymous, enough to"
            " read a public bucket."
        ),
    ] = None
    read: Annotated[
        bool,
        Meta(description="Serve paths of the bucket that the store does not have. The bucket precedes `upstream`."),
    ] = True
    redirect: Annotated[
        bool,
        Meta(
            description="Send clients to the bucket for NARs, with a URL that is signed for 15 minutes, instead of"
            " fetching NARs through this server."
        ),
    ] = False
    write_served: Annotated[
        bool,
        Meta(
            description="Write the closure of each store path that a client downloads to the bucket. Downloads never"
            " wait for this: paths wait in a queue below `cache_dir`."
        ),
    ] = False
    public_keys: Annotated[
        tuple[str, ...],
        Meta(
            extra={"default": "those of `sign_key_paths`"},
            description="Public keys like `name:base64`. Only paths of the bucket that are signed by one of them are"
            " served; without any keys, all paths.",
        ),
    ] = ()
    connect_timeout: Annotated[Seconds, Meta(description="Timeout for a connection to the S3 service, to read.")] = 2.0
    timeout: Annotated[
        Seconds, Meta(description="Timeout for the first byte of a response, and for each pause between its bytes.")
    ] = 10.0

    def __post_init__(self) -> None:
        check_values(value_types.check_bucket, [self.bucket], "mirror", "bucket")
        check_values(value_types.check_public_key, self.public_keys, "mirror", "public_keys")
        check_values(value_types.check_prefix, [self.prefix or None], "mirror", "prefix")
        check_values(value_types.check_path, [self.credentials_file], "mirror", "credentials_file")
        for given, needed in (("bucket", "endpoint"), ("endpoint", "bucket")):
            if getattr(self, given) is not None and getattr(self, needed) is None:
                raise WrongSettingError(f"set without {needed}; set both or none", "mirror", given)
        if self.write_served and self.bucket is None:
            raise WrongSettingError("set without bucket; set both or none", "mirror", "write_served")
        if self.redirect and self.credentials_file is None:
            what = "set without credentials_file, whose key signs the URLs; set both, or use the bucket as [[upstream]]"
            raise WrongSettingError(what, "mirror", "redirect")

    @property
    def is_read(self) -> bool:
        """Return True if paths of the bucket are served."""
        return self.read and self.bucket is not None

    @property
    def source(self) -> Upstream:
        """Return the bucket as an upstream, which is asked before all others."""
        return Upstream(
            url=self.url,
            public_keys=self.public_keys,
            priority=-1,
            connect_timeout=self.connect_timeout,
            timeout=self.timeout,
        )

    @property
    def url(self) -> str:
        """Return the URL of the cache in the bucket."""
        return "/".join(filter(None, ((self.endpoint or "").rstrip("/"), self.bucket, self.prefix)))
