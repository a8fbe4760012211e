"""Masks that are arrays: `.npy`, `.npz` and `.mat` files."""

from __future__ import annotations

import io
import pathlib
from typing import Any

import numpy as np

from deeplab_jax.data.io import images
from deeplab_jax.utils.errors import UserError, listed

SUFFIXES = frozenset((".npy", ".npz", ".mat"))


def read_array(path: pathlib.Path) -> np.ndarray:
    """Reads the array of a `.npy` file, or the one matrix of whole numbers in another file.

    In a `.mat` file of SBD, that is `GTcls.Segmentation`.

    Raises:
      UserError: the file is missing or damaged, or does not have exactly one such matrix.
    """
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return images.read_array(path)
    title, command = "a MATLAB file, up to version 7", "save('FILE.mat', 'mask', '-v7')"
    if suffix == ".npz":
        title, command = "an archive of arrays", "numpy.savez('FILE.npz', mask=mask)"
    data = io.BytesIO(images.read_bytes(path))
    try:
        variables = (
            _read_matlab(data) if suffix == ".mat" else dict(np.load(data, allow_pickle=False))
        )
    except Exception as error:  # parsers of SciPy and NumPy raise errors of many types
        raise UserError(
            f"{path}: truncated, or not {title} ({error}). Save the mask again: `{command}`."
        ) from None
    found = {name: value for name, value in variables.items() if _is_matrix(value)}
    if len(found) != 1:
        names = [f"{name} {list(np.shape(value))}" for name, value in (found or variables).items()]
        sbd = " SBD's class masks are in benchmark_RELEASE/dataset/cls, not in dataset/inst."
        raise UserError(
            f"{path}: has {len(found) or 'no'} matrices of whole numbers, expected one; it holds "
            f"{listed(names) or 'nothing'}. Save only the mask: `{command}`."
            + (sbd if suffix == ".mat" else "")
        )
    return next(iter(found.values()))


def _read_matlab(data: io.BytesIO) -> dict[str, Any]:
    import scipy.io  # takes 0.25 s, and most data sets do not need it

    variables = scipy.io.loadmat(data)
    ground_truth = np.asarray(variables.get("GTcls"))
    if "Segmentation" in (ground_truth.dtype.names or ()):
        return {"GTcls.Segmentation": ground_truth["Segmentation"].flat[0]}
    return {name: value for name, value in variables.items() if not name.startswith("__")}


def _is_matrix(value: Any) -> bool:
    """Whether a variable may be a mask: no scalar, no vector, no text."""
    if not isinstance(value, np.ndarray) or value.ndim != 2 or min(value.shape) < 2:
        return False
    if value.dtype.kind == "f":
        return bool((value == np.floor(value)).all())
    return value.dtype.kind in "biu"
