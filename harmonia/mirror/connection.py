"""Opens the mirror's bucket, if obstore is installed."""

from typing import TYPE_CHECKING

from harmonia.config import credentials
from harmonia.config.settings import Settings, WrongSettingError

if TYPE_CHECKING:
    from harmonia.mirror.bucket import Bucket


def open_bucket(settings: Settings) -> "Bucket":
    """Return the bucket of the settings. Sends no request.

    Raises WrongSettingError if there is none, if its credentials cannot be read, or if obstore is not installed.
    """
    if settings.mirror.bucket is None:
        raise WrongSettingError("not set; name the bucket, and set mirror.endpoint", "mirror", "bucket")
    keys = credentials.mirror_keys(settings)
    try:
        from harmonia.mirror.bucket import Bucket  # noqa: PLC0415 (obstore is optional)
    except ModuleNotFoundError as error:
        what = f"needs the Python package {error.name}; install harmonia[s3], or the package with withS3 = true"
        raise WrongSettingError(what, "mirror", "bucket") from None
    return Bucket(settings.mirror, keys)
