"""Python packages that only some settings need."""

from importlib import import_module

from harmonia.config.settings import Settings
from harmonia.config.wrong_setting import WrongSettingError


def require_all(settings: Settings) -> None:
    """Import the packages that the settings need. Raises WrongSettingError if one is not installed."""
    if settings.mirror.bucket is not None:
        require_obstore()
    if settings.lan.announce or settings.lan.public_keys:
        require_zeroconf()


def require_zeroconf() -> None:
    """Import zeroconf, for siblings. Raises WrongSettingError if it is not installed."""
    _require("zeroconf", "harmonia[lan], or the package with withLan = true", "lan", "announce")


def require_obstore() -> None:
    """Import obstore, the client of S3 services. Raises WrongSettingError if it is not installed."""
    _require("obstore", "harmonia[s3], or the package with withS3 = true", "mirror", "bucket")


def _require(package: str, remedy: str, *key: str) -> None:
    try:
        import_module(package)
    except ModuleNotFoundError as error:
        raise WrongSettingError(f"needs the Python package {error.name}; install {remedy}", *key) from None
