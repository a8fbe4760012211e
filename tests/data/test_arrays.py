"""Masks in `.npz` and `.mat` files: one matrix of whole numbers, whatever its name."""

import numpy as np
import pytest
import scipy.io

from deeplab_jax.data.io import arrays, masks
from deeplab_jax.utils.errors import UserError

IDS = np.random.default_rng(0).integers(0, 5, (6, 9))


def write(path, **variables):
    if path.suffix == ".mat":
        scipy.io.savemat(path, variables)
    else:
        np.savez(path, **variables)
    return path


@pytest.mark.parametrize("suffix", [".mat", ".npz"])
@pytest.mark.parametrize("dtype", ["uint8", "int64", "float64", "bool"])
def test_the_one_matrix_is_the_mask(tmp_path, suffix, dtype):
    ids = IDS.astype(dtype)
    others = {"title": "a mask", "scale": 2.5, "sizes": [1, 2, 3], "heat": IDS + 0.5}
    path = write(tmp_path / f"a{suffix}", LabelMap=ids, **others)
    found = masks.read_ids(path)
    np.testing.assert_array_equal(found, ids)
    np.testing.assert_array_equal(arrays.read_array(path), ids)


@pytest.mark.parametrize("suffix", [".mat", ".npz"])
@pytest.mark.parametrize(
    ("variables", "words"),
    [
        (
            {"first": IDS, "second": IDS},
            "has 2 matrices of whole numbers, expected one; it holds "
            "first [6, 9], second [6, 9]. Save only the mask: `",
        ),
        (
            {"heat": IDS / 7, "cube": np.zeros((2, 3, 4))},
            "has no matrices of whole numbers, "
            "expected one; it holds heat [6, 9], cube [2, 3, 4]. Save only the mask: `",
        ),
    ],
)
def test_the_error_lists_the_names(tmp_path, suffix, variables, words):
    path = write(tmp_path / f"a{suffix}", **variables)
    with pytest.raises(UserError) as raised:
        masks.read_ids(path)
    assert f"{path}: {words}" in str(raised.value)
    command = {".mat": "save('FILE.mat', 'mask', '-v7')", ".npz": "numpy.savez("}[suffix]
    assert command in str(raised.value)


def test_matlab_7_3_is_asked_to_be_saved_as_7(tmp_path):
    path = tmp_path / "a.mat"
    header = b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM"
    path.write_bytes(header.ljust(512, b"\0") + b"\x89HDF\r\n\x1a\n" + bytes(600))
    with pytest.raises(UserError, match=r"a\.mat: .*matlab v7\.3.*`save\(.*'-v7'\)`"):
        masks.read_ids(path)


@pytest.mark.parametrize("suffix", [".mat", ".npz"])
def test_broken_files(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", mask=IDS)
    for data in (path.read_bytes()[:150], b"", b"text"):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"truncated, or not an? (MATLAB file|archive)"):
            masks.read_ids(path)


def test_an_archive_of_objects_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", mask=np.array([{}], object))
    with pytest.raises(UserError, match="not an archive of arrays"):
        masks.read_ids(tmp_path / "a.npz")
