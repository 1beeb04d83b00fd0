"""Opens the mirror's bucket, if obstore is installed."""

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING
from urllib.parse import unquote

from harmonia.config import credentials
from harmonia.config.optional_packages import require_obstore
from harmonia.config.settings import Settings
from harmonia.config.wrong_setting import WrongSettingError

if TYPE_CHECKING:
    from harmonia.mirror.bucket import Bucket

QUEUED_RETRY = timedelta(seconds=2)
"""Time for which a request is repeated if a queue repeats the upload."""
_RETRY = timedelta(seconds=60)
_SIGNATURE_LIFETIME = timedelta(minutes=15)  # for the start of a download, and for clocks that differ

Presign = Callable[[str, str], str]
"""Returns a URL of the bucket with a signature, which grants this method (GET or HEAD) to everyone for a time."""


def open_bucket(settings: Settings, retry: timedelta = _RETRY) -> "Bucket":
    """Return the bucket of the settings. Sends no request. Later requests that fail are repeated for `retry`.

    Raises WrongSettingError if there is none, if its credentials cannot be read, or if obstore is not installed.
    """
    if settings.mirror.bucket is None:
        raise WrongSettingError("not set; name the bucket, and set mirror.endpoint", "mirror", "bucket")
    keys = credentials.mirror_keys(settings)
    require_obstore()
    from harmonia.mirror.bucket import Bucket  # noqa: PLC0415 (obstore is optional)

    return Bucket(settings.mirror, keys, retry)


def open_presigner(settings: Settings) -> Presign | None:
    """Return a function that signs URLs of the bucket, or None without credentials. Raises as `open_bucket`."""
    bucket = open_bucket(settings)
    if settings.mirror.credentials_file is None:
        return None

    def presign(method: str, url: str) -> str:
        return bucket.presign(method, unquote(url.removeprefix(f"{bucket.url}/")), _SIGNATURE_LIFETIME)

    return presign
