"""Files that are damaged, in every place, or no files of weights at all."""

import collections
import copy
import io
import pickle
import re
import zipfile

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import safetensors.torch
from file_damage import mutated, read_damaged, settings

from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights import torch_file
from deeplab_jax.weights.torch_format import pickle_reader
from torch_reference import assert_same, torch, torch_zip, write_zip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n\n<!DOCTYPE html><html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"nonsense", "begins with the bytes 6e 6f 6e"),
        (b"PK\x03\x04 and no more", "damaged or truncated zip"),
        (b"\x80", "damaged or truncated pickle"),
        (b"\x80\x02}.", "not a PyTorch file"),
        (pickle.dumps(3, protocol=4), "not a PyTorch file"),
        (b"\x20\0\0\0\0\0\0\0{garbage", "damaged safetensors"),
        (b"\2\0\0\0\0\0\0\0{}", "holds no arrays"),
    ],
)
def test_other_files(tmp_path, content, message):
    path = tmp_path / "odd.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"odd\.pth .*{message}"):
        torch_file.read(path)


def test_unreadable_paths(tmp_path):
    for path in (tmp_path / "absent.pth", tmp_path):
        with pytest.raises(UserError, match=re.escape(f"{path} cannot be read: ")):
            torch_file.read(path)


def test_damaged_archives(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        good = {name: archive.read(name) for name in archive.namelist()}

    def refused(message, entries, compression=zipfile.ZIP_STORED):
        path = write_zip(tmp_path / "bad.pth", entries, compression)
        with pytest.raises(UserError, match=rf"bad\.pth .*{message}"):
            torch_file.read(path)

    assert torch_file.read(write_zip(tmp_path / "good.pth", good))["a"].tolist() == [1, 1, 1]
    without = {name: content for name, content in good.items() if name != "a/data.pkl"}
    refused("has no entry data.pkl", without)
    refused("lacks the entry data/0", {k: v for k, v in good.items() if k != "a/data/0"})
    refused("has the byte order b'big'", good | {"a/byteorder": b"big"})
    refused("TorchScript", good | {"a/constants.pkl": b""})
    refused("two entries of the archive have the same name", good | {"b/data/0": bytes(12)})
    refused("without compression", good, zipfile.ZIP_DEFLATED)


def test_entries_that_overlap(tmp_path):
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", PICKLE)
        archive.writestr("a/data/0", bytes(10_000))
        for key in range(1, 5):
            copied = copy.copy(archive.getinfo("a/data/0"))
            copied.filename = copied.orig_filename = f"a/data/{key}"
            archive.filelist.append(copied)
    with pytest.raises(UserError, match="its entries are larger than the file"):
        torch_file.read(path)


def test_flipped_bit_of_an_array_is_noticed(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"a": torch.full((1000,), 3.0)}, path)
    content = bytearray(path.read_bytes())
    content[content.index(np.float32(3).tobytes() * 10) + 1000] ^= 1
    path.write_bytes(content)
    assert torch.load(path)["a"].unique().numel() == 2  # PyTorch does not notice
    with pytest.raises(UserError, match=r"checksum of its entry data/0 is wrong"):
        torch_file.read(path)


SMALL = {
    "conv.weight": torch.arange(24.0).reshape(2, 3, 2, 2),
    "bn.num_batches_tracked": torch.tensor(5),
    "half": torch.ones(3, dtype=torch.bfloat16)[1:],
}


def saved(**options):
    buffer = io.BytesIO()
    torch.save(collections.OrderedDict(SMALL), buffer, **options)
    return buffer.getvalue()


ZIP = saved()
LEGACY = saved(_use_new_zipfile_serialization=False)
SAFETENSORS = safetensors.torch.save({name: tensor.clone() for name, tensor in SMALL.items()})
with zipfile.ZipFile(io.BytesIO(ZIP)) as _archive:
    PICKLE = _archive.read("archive/data.pkl")
    CONTENTS = {str(key): _archive.read(f"archive/data/{key}") for key in range(3)}


@settings
@hypothesis.given(content=mutated(ZIP))
def test_damaged_zip_is_refused_or_read_correctly(tmp_path, content):
    path = tmp_path / "damaged.pth"
    path.write_bytes(content)
    arrays = read_damaged(path)
    if arrays is not None:
        assert_same(arrays, SMALL)


@settings
@hypothesis.given(pickled=mutated(PICKLE))
def test_damaged_pickle_with_a_right_checksum(tmp_path, pickled):
    read_damaged(torch_zip(tmp_path / "damaged.pth", pickled, CONTENTS))


@settings
@hypothesis.given(content=st.one_of(mutated(LEGACY), mutated(SAFETENSORS)))
def test_damaged_legacy_and_safetensors(tmp_path, content):
    path = tmp_path / "damaged.pth"
    path.write_bytes(content)
    read_damaged(path)


@settings
@hypothesis.given(
    pickled=st.lists(
        st.sampled_from([getattr(pickle, name) for name in sorted(pickle_reader._INSTRUCTIONS)]),
        max_size=40,
    )
)
def test_random_instructions(tmp_path, pickled):
    operands = b"\0\0\0\0\0\0\0\0"
    read_damaged(
        torch_zip(tmp_path / "random.pth", b"".join([b"\x80\x02", *pickled, operands, b"."]))
    )


@pytest.mark.parametrize(
    "original", [ZIP, LEGACY, SAFETENSORS], ids=["zip", "legacy", "safetensors"]
)
def test_every_truncation_is_refused(tmp_path, original):
    path = tmp_path / "truncated.pth"
    for length in range(0, len(original), 7):
        path.write_bytes(original[:length])
        assert read_damaged(path) is None, length
