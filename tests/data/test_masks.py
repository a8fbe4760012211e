"""Masks are read exactly, and no damaged file passes the checks."""

import pathlib
import struct
import zlib

import numpy as np
import pytest
import scipy.io
from PIL import Image

from deeplab_jax.data.dataset import Pair, check_ids
from deeplab_jax.data.io import images, masks
from deeplab_jax.data.labels import IGNORE, VOC, named
from deeplab_jax.utils.errors import UserError

RNG = np.random.default_rng(0)
EIGHT = named(*"abcdefgh")


def image(height: int, width: int) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), np.uint8)


def write_pair(folder: pathlib.Path, image: np.ndarray, ids: np.ndarray) -> Pair:
    Image.fromarray(image).save(folder / "image.png")
    Image.fromarray(ids).save(folder / "mask.png")
    return Pair("pair", folder / "image.png", folder / "mask.png", folder)


def grey_png(ids: np.ndarray, bits: int) -> bytes:
    """A grey PNG of `bits` bits a pixel, put together by the format's own definition."""
    per_byte = 8 // bits
    rows = b""
    for row in ids:
        padded = np.pad(row, (0, -len(row) % per_byte)).reshape(-1, per_byte)
        packed = sum(padded[:, i].astype(int) << (8 - bits * (i + 1)) for i in range(per_byte))
        rows += b"\0" + bytes(packed.tolist())

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", ids.shape[1], ids.shape[0], bits, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (375, 500)])
def test_labels_survive_storage(shape):
    label = RNG.integers(0, 256, shape, np.uint8)
    np.testing.assert_array_equal(masks.decode_label(masks.encode_label(label)), label)


def test_truncated_png_is_noticed(tmp_path):
    Image.fromarray(RNG.integers(0, 21, (50, 60), np.uint8)).save(tmp_path / "cut.png")
    data = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"cut\.png: is truncated or damaged"):
        masks.read_ids(tmp_path / "cut.png")
    with pytest.raises(UserError, match=r"cut\.png: is truncated or damaged"):
        images.read_image(tmp_path / "cut.png")


def test_palette_masks_give_ids_not_colors(tmp_path):
    ids = RNG.choice(np.array([0, 1, 5, 20, 255], np.uint8), (12, 10))
    mask = Image.fromarray(ids).convert("P")
    mask.putpalette(VOC.palette().tobytes())
    mask.save(tmp_path / "mask.png")
    assert Image.open(tmp_path / "mask.png").mode == "P"
    np.testing.assert_array_equal(masks.read_ids(tmp_path / "mask.png"), ids)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_masks_of_few_bits_keep_their_ids(tmp_path, bits):
    ids = RNG.integers(0, min(2**bits, 21), (5, 13))
    (tmp_path / "mask.png").write_bytes(grey_png(ids, bits))
    np.testing.assert_array_equal(masks.read_ids(tmp_path / "mask.png"), ids)


def test_masks_of_16_bits_keep_their_ids(tmp_path):
    ids = np.array([[0, 300], [20, 65535]], np.uint16)
    Image.fromarray(ids).save(tmp_path / "mask.png")
    np.testing.assert_array_equal(masks.read_ids(tmp_path / "mask.png"), ids)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colors_are_not_ids(tmp_path, mode):
    Image.new(mode, (4, 3), "red").save(tmp_path / "mask.png")
    with pytest.raises(UserError, match=r"mask\.png: holds colours.*palette PNG"):
        masks.read_ids(tmp_path / "mask.png")


@pytest.mark.parametrize("dtype", [np.uint8, np.float64])
def test_sbd_masks(tmp_path, dtype):
    ids = RNG.integers(0, 21, (6, 9)).astype(dtype)
    scipy.io.savemat(tmp_path / "a.mat", {"GTcls": {"Segmentation": ids, "Boundaries": [1, 2]}})
    np.testing.assert_array_equal(masks.read_ids(tmp_path / "a.mat"), ids)


@pytest.mark.parametrize(
    "variables",
    [{"other": 1}, {"GTcls": 3}, {"GTcls": {"Boundaries": 1}}, {"GTinst": {"Segmentation": 1}}],
)
def test_mat_without_ground_truth(tmp_path, variables):
    scipy.io.savemat(tmp_path / "a.mat", variables)
    with pytest.raises(UserError, match=r"a\.mat: has no matrices .*; it holds .*dataset/cls"):
        masks.read_ids(tmp_path / "a.mat")


@pytest.mark.parametrize("ids", [np.full((2, 2), 0.5), np.zeros((2, 2, 2))])
def test_mat_without_whole_numbers(tmp_path, ids):
    scipy.io.savemat(tmp_path / "a.mat", {"GTcls": {"Segmentation": ids}})
    with pytest.raises(UserError, match=r"a\.mat: has no matrices .* GTcls\.Segmentation \["):
        masks.read_ids(tmp_path / "a.mat")


def test_broken_mat(tmp_path):
    scipy.io.savemat(tmp_path / "a.mat", {"GTcls": {"Segmentation": np.zeros((40, 40))}})
    data = (tmp_path / "a.mat").read_bytes()
    (tmp_path / "a.mat").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"a\.mat: truncated, or not a MATLAB file"):
        masks.read_ids(tmp_path / "a.mat")


@pytest.mark.parametrize("ignore_label", [255, 11, 0, 3])
def test_ignore_label_is_mapped(ignore_label):
    mask_format = masks.MaskFormat("ids", named(*"abcdefghijk"), ignore_label)
    ids = np.array([[0, 1, 3], [10, ignore_label, ignore_label]])
    expected = [[IGNORE if i == ignore_label else i for i in row] for row in ids.tolist()]
    assert mask_format.to_ids(ids).tolist() == expected


def test_255_is_unknown_if_another_label_is_ignored():
    mask_format = masks.MaskFormat("ids", named(*"abcdefghijk"), 11)
    assert mask_format.to_ids(np.array([[255, 0]])).tolist() == [[masks.UNKNOWN, 0]]


def test_unknown_ids_are_named_and_counted():
    check_ids(np.array([[0, 255, 20]]), VOC, "some/m.png")
    with pytest.raises(UserError) as raised:
        check_ids(np.array([[0, 57, 57], [255, 21, 20]]), VOC, "some/m.png")
    message = str(raised.value)
    assert message.startswith("some/m.png: the label holds id 21 (1 pixels), id 57 (2 pixels)")
    assert "a class (0 to 20) or 255 for" in message


def test_many_unknown_ids_are_summed_up():
    with pytest.raises(UserError, match=r"id 15 \(1 pixels\) and 54 more"):
        check_ids(np.arange(70)[None], EIGHT, "m.png")


def test_read_label(tmp_path):
    ids = RNG.choice(np.array([0, 7, 255], np.uint8), (13, 17))
    pair = write_pair(tmp_path, image(13, 17), ids)
    np.testing.assert_array_equal(masks.read_label(pair, EIGHT), ids)


def test_mask_of_another_size_names_both(tmp_path):
    pair = write_pair(tmp_path, image(13, 17), np.zeros((17, 13), np.uint8))
    with pytest.raises(UserError, match=r"mask\.png: is 13 x 17 .*image\.png is 17 x 13\. A mask"):
        masks.read_label(pair, EIGHT)


def test_a_turned_image_is_explained(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    pair = write_pair(tmp_path, image(13, 17), np.zeros((17, 13), np.uint8))
    Image.fromarray(image(13, 17)).save(pair.image, exif=exif)
    with pytest.raises(UserError, match=r"as stored \(viewers apply EXIF orientation 6\)"):
        masks.read_label(pair, EIGHT)


@pytest.mark.parametrize("file", ["image.png", "mask.png"])
def test_a_missing_file_names_what_lists_it(tmp_path, file):
    pair = write_pair(tmp_path, image(3, 4), np.zeros((3, 4), np.uint8))
    (tmp_path / file).unlink()
    with pytest.raises(UserError) as raised:
        masks.read_label(pair, EIGHT)
    assert str(raised.value) == f"{tmp_path / file}: is missing, but {tmp_path} names pair."
