"""Python packages that only some settings need."""

from importlib import import_module

from harmonia.config.settings import WrongSettingError


def require_obstore() -> None:
    """Import obstore, the client of S3 services. Raises WrongSettingError if it is not installed."""
    try:
        import_module("obstore")
    except ModuleNotFoundError as error:
        what = f"needs the Python package {error.name}; install harmonia[s3], or the package with withS3 = true"
        raise WrongSettingError(what, "mirror", "bucket") from None
