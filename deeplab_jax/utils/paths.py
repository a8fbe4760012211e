"""Paths as users write them."""

from __future__ import annotations

import os
import pathlib

from deeplab_jax.utils.errors import UserError

CALIBRATION = "calibration.json"  # in a model's folder; see `inference.calibration`


def expand_home(path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns a path with a leading `~` or `~user` replaced by the home folder, if there is one."""
    return pathlib.Path(os.path.expanduser(path))  # `Path.expanduser` raises for unknown users


def user_cache() -> pathlib.Path:
    """Returns the folder for caches of the user: `$XDG_CACHE_HOME`, or `~/.cache`."""
    return expand_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache")


def is_bucket(path: str | os.PathLike[str]) -> bool:
    """Whether a text is the address of an object or folder in a bucket, see `buckets`."""
    return str(path).startswith(("gs://", "s3://"))


def required_path(path: str | os.PathLike[str], name: str) -> pathlib.Path:
    """Returns a path with a leading `~` replaced by the home folder; `name` is for errors.

    Raises:
      UserError: the path is empty, or is an address that `pathlib` has changed.
    """
    text = os.fspath(path)
    if text.startswith(("gs:/", "s3:/")) and not is_bucket(text):
        raise UserError(f"{name}: give an address in a bucket as text, not as pathlib.Path: {text}")
    if not text.strip():
        raise UserError(
            f"{name} is empty. If it comes from a shell variable, the variable is unset"
        )
    return expand_home(text)
