"""Paths as users write them."""

from __future__ import annotations

import os
import pathlib

from deeplab_jax.utils.errors import UserError


def required_path(path: str | os.PathLike[str], name: str) -> pathlib.Path:
    """Returns a path with a leading `~` replaced by the home folder.

    Args:
      path: As the user gave it.
      name: What the path is, for the error message.

    Raises:
      UserError: The path is empty.
    """
    text = os.fspath(path)
    if not text.strip():
        raise UserError(
            f"{name} is empty. If it comes from a shell variable, the variable is unset"
        )
    return pathlib.Path(os.path.expanduser(text))
