"""The moorage server: a cache of loaded models behind a gRPC service."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("moorage")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0"
