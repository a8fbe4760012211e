"""Proposes and writes a file of classes that fits a user's masks."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import pathlib
import tempfile
from collections.abc import Sequence

from deeplab_jax.config import DataConfig
from deeplab_jax.data.dataset import Pair
from deeplab_jax.data.datasets.mask_format import class_file, classes_path, read_mask_format
from deeplab_jax.data.io import classes, mask_survey
from deeplab_jax.data.io.mask_survey import MaskSample
from deeplab_jax.data.io.masks import MaskFormat
from deeplab_jax.utils.errors import UserError
from deeplab_jax.utils.files import write_bytes
from deeplab_jax.utils.paths import expand_home
from deeplab_jax.utils.progress import parallel_map


def propose(config: DataConfig, samples: Sequence[MaskSample]) -> str:
    """Returns a file of classes with all values of the masks, and the names that are known.

    Raises:
      UserError: the masks do not show what the classes are; or there is a file of classes that
        states their values, or is wrong.
    """
    if not samples:
        raise UserError(f"{config.root}: no mask can be read")
    path = existing_file(config)
    table = classes.read(path) if path else None
    if table and table.states_values and path == classes_path(config):
        raise UserError(f"{path}: states values. Add the others there yourself")
    return mask_survey.propose_classes(samples, table, config.ignore_label)


def try_to_propose(
    config: DataConfig, pairs: Sequence[Pair], samples: Sequence[MaskSample]
) -> tuple[str, MaskFormat | None]:
    """Returns a file of classes and the masks' format with it; empty and None if there is none."""
    with contextlib.suppress(UserError), tempfile.TemporaryDirectory() as scratch:
        text = propose(config, samples)
        path = pathlib.Path(scratch) / "classes.txt"
        path.write_text(text, encoding="utf-8")
        folder = dataclasses.replace(config.folder, classes=str(path))
        return text, read_mask_format(dataclasses.replace(config, folder=folder), pairs)
    return "", None


def existing_file(config: DataConfig) -> pathlib.Path | None:
    """Returns the file of classes that would be used, if there is one."""
    is_absent = config.folder.classes and not expand_home(config.folder.classes).exists()
    return None if is_absent else class_file(config)[0]


def survey_all(paths: Sequence[pathlib.Path], num_threads: int = 0) -> list[MaskSample]:
    """Reads all masks, with a progress bar on stderr; leaves out those that cannot be read."""
    title, sample = "Reading masks", mask_survey.try_to_sample
    samples = parallel_map(sample, paths, title, num_threads=num_threads)
    return [sample for sample in samples if sample is not None]


def write(config: DataConfig, text: str) -> tuple[pathlib.Path, pathlib.Path | None]:
    """Writes a file of classes; one that is there is kept. Returns the new and the old one's path.

    Raises:
      UserError: the folder is not writable.
    """
    path, old = classes_path(config), None
    try:
        if path.exists():
            suffixes = itertools.chain([""], itertools.count(2))
            candidates = (path.with_name(f"{path.name}.orig{suffix}") for suffix in suffixes)
            old = next(each for each in candidates if not each.exists())
            write_bytes(old, path.read_bytes())
        write_bytes(path, text.encode())
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}). Write another file: "
            "--write-classes --classes my_classes.txt"
        ) from None
    return path, old
