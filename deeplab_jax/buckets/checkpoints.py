"""Checkpoints in a bucket, each of which exists once its marker does.

The marker `checkpoints/N/commit_success.txt` lists the other files of the checkpoint. It is written
after them and after the metrics up to step N, and deleted before them.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Iterable, Mapping

from deeplab_jax.utils.download import file_digest

MARKER = "commit_success.txt"

# Other runs may be in other folders. `stage1` is that of the first of two stages.
_FILE = re.compile(r"((?:stage1/)?checkpoints/\d+)/.*", re.S)

Sums = tuple[int, str]  # size and SHA-256 of a file


def checkpoint_of(name: str) -> str:
    """Returns the folder of the run's checkpoint that has a file; empty if none has."""
    match = _FILE.fullmatch(name)
    return match[1] if match else ""


def sums_of(path: pathlib.Path) -> Sums:
    """Computes what a marker says about a file."""
    return path.stat().st_size, file_digest(path, "sha256")


def marker(files: Mapping[str, Sums]) -> bytes:
    """Returns the content of a marker, from the files by their names in the checkpoint."""
    return json.dumps({"files": files}).encode()


def marked_files(checkpoint: str, content: bytes, names: Iterable[str]) -> dict[str, Sums | None]:
    """Returns the files of a checkpoint by name, from its marker.

    Args:
      checkpoint: its name.
      content: of the marker. Orbax writes another text into a file of this name.
      names: all objects of the run: if Orbax wrote the marker, those in the checkpoint count.
    """
    try:
        files = json.loads(content)["files"].items()
        return {f"{checkpoint}/{name}": (size, digest) for name, (size, digest) in files}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {name: None for name in names if name.startswith(f"{checkpoint}/")}
