"""Masks of odd types are read where they are unambiguous, and refused with the right advice."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from deeplab_jax.data.dataset import Pair
from deeplab_jax.data.io import images, masks
from deeplab_jax.data.labels import LabelSet, named
from deeplab_jax.data_check.scan import scan_pair
from deeplab_jax.utils.errors import UserError

RNG = np.random.default_rng(0)
IDS = RNG.integers(0, 5, (9, 14)).astype(np.uint8)
OPAQUE = np.full_like(IDS, 255)
FIVE = named(*"abcde")
FORMAT = masks.MaskFormat("ids", FIVE, 255)


def save(path, image, **options):
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(path, **options)
    return path


def refusal(path, mask_format=FORMAT):
    with pytest.raises(UserError) as error:
        mask_format.read_label(path)
    return str(error.value)


def check_read(path, expected=IDS):
    np.testing.assert_array_equal(FORMAT.read_label(path), expected)


@pytest.mark.parametrize("alpha", [0, 128, 255])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".tga"])
def test_grey_with_a_constant_alpha_channel(tmp_path, suffix, alpha):
    image = np.dstack([IDS, np.full_like(IDS, alpha)])
    check_read(save(tmp_path / f"a{suffix}", Image.fromarray(image, "LA")))


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp", ".tga", ".ppm"])
def test_equal_red_green_and_blue(tmp_path, suffix):
    check_read(save(tmp_path / f"a{suffix}", np.dstack([IDS] * 3)))


def test_equal_colours_with_alpha(tmp_path):
    check_read(save(tmp_path / "a.png", np.dstack([IDS, IDS, IDS, OPAQUE])))


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_equal_colours_of_16_bits(tmp_path, suffix, channels):
    assert cv2.imwrite(str(tmp_path / f"a{suffix}"), np.dstack([IDS] * channels).astype(np.uint16))
    if channels == 3:
        check_read(tmp_path / f"a{suffix}")
    else:  # the fourth is alpha
        assert "has transparent pixels" in refusal(tmp_path / f"a{suffix}")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_floats_that_are_whole_numbers(tmp_path, dtype, channels):
    raw = [cv2.IMWRITE_TIFF_COMPRESSION, 1]  # some versions would round floats
    assert cv2.imwrite(str(tmp_path / "a.tif"), np.dstack([IDS] * channels).astype(dtype), raw)
    check_read(tmp_path / "a.tif")


@pytest.mark.parametrize("shape", [(9, 14), (9, 14, 1)])
@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.uint16, np.uint8])
def test_arrays(tmp_path, dtype, shape):
    np.save(tmp_path / "a.npy", IDS.astype(dtype).reshape(shape))
    check_read(tmp_path / "a.npy")


@pytest.mark.parametrize("value", [0.5, np.nan])
@pytest.mark.parametrize("encoding", ["ids", "binary", "colors"])
def test_fractions_are_refused_with_advice(tmp_path, value, encoding):
    floats = IDS.astype(np.float32)
    floats[2, 3] = value
    mask_format = masks.MaskFormat(encoding, masks.BINARY if encoding == "binary" else FIVE, 255)
    message = refusal(save(tmp_path / "a.tif", floats), mask_format)
    assert "whole numbers" in message
    assert "masks_hold" not in message


def test_no_data_values_of_floats_are_unknown(tmp_path):
    floats = IDS.astype(np.float32)
    floats[2, 3] = -3.4e38
    assert "is neither a class" in refusal(save(tmp_path / "a.tif", floats))


@pytest.mark.parametrize("channels", [1, 3])
def test_transparent_pixels_are_refused_with_advice(tmp_path, channels):
    image = np.dstack([IDS] * channels + [np.where(IDS == 2, 0, 255).astype(np.uint8)])
    message = refusal(save(tmp_path / "a.png", Image.fromarray(image)))
    assert "without alpha channel" in message
    assert "masks_hold" not in message


def test_colours_are_refused_with_advice(tmp_path):
    colors = np.array(FIVE.colors, np.uint8)[IDS]
    message = refusal(save(tmp_path / "a.png", np.dstack([colors, OPAQUE])))
    assert "config.data.folder.masks_hold=colors" in message


def test_grey_colours_give_the_advice_for_colours(tmp_path):
    labels = LabelSet(("a", "b"), ((0, 0, 0), (128, 128, 128)))
    path = save(tmp_path / "a.png", np.dstack([np.where(IDS > 2, 128, 0).astype(np.uint8)] * 3))
    message = refusal(path, masks.MaskFormat("ids", labels, 255))
    assert "id 128" in message
    assert "config.data.folder.masks_hold=colors" in message


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_ids_where_colours_or_0_and_255_are_expected(tmp_path, dtype):
    path = save(tmp_path / "a.tif", IDS.astype(dtype))
    for encoding, labels in (("colors", FIVE), ("binary", masks.BINARY)):
        message = refusal(path, masks.MaskFormat(encoding, labels, 255))
        assert "config.data.folder.masks_hold=ids" in message


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32])
def test_binary_masks_of_any_type(tmp_path, dtype):
    path = save(tmp_path / "a.tif", np.where(IDS > 2, 255, 0).astype(dtype))
    label = masks.MaskFormat("binary", masks.BINARY, 255).read_label(path)
    np.testing.assert_array_equal(label, IDS > 2)


@pytest.mark.parametrize("kind", ["P2", "P5"])
@pytest.mark.parametrize("largest", [4, 20, 300])
def test_netpbm_masks_keep_their_ids(tmp_path, kind, largest):
    """Their header states the largest value, to which Pillow scales."""
    content = IDS.astype(">u2" if largest > 255 else "u1").tobytes()
    if kind == "P2":
        content = " ".join(map(str, IDS.ravel())).encode() + b"\n"
    (tmp_path / "a.pgm").write_bytes(f"{kind}\n14 9\n{largest}\n".encode() + content)
    check_read(tmp_path / "a.pgm")


def test_masks_beyond_pillows_limit_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    check_read(save(tmp_path / "a.png", IDS))


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
@pytest.mark.parametrize("encoding", ["colors", "binary"])
def test_a_mask_in_the_alpha_channel_is_refused(tmp_path, encoding, mode):
    """As of editors that cut objects out: all opaque and transparent pixels are white."""
    white = [OPAQUE] * (len(mode) - 1)
    shape = np.where(IDS > 2, 255, 0).astype(np.uint8)
    path = save(tmp_path / "a.png", Image.fromarray(np.dstack([*white, shape])))
    labels = masks.BINARY if encoding == "binary" else FIVE
    message = refusal(path, masks.MaskFormat(encoding, labels, 255))
    assert "if that channel is the mask, save it as a grey PNG" in message


def test_colours_where_0_and_255_are_expected(tmp_path):
    red = np.where(IDS > 2, 255, 0).astype(np.uint8)
    path = save(tmp_path / "a.png", np.dstack([red, red * 0, red * 0]))
    message = refusal(path, masks.MaskFormat("binary", masks.BINARY, 255))
    assert "holds colours, not 0 and 255" in message


@pytest.mark.parametrize("value", [2**32 + 1, 2**40, -1, -(2**32) + 1])
def test_integers_do_not_wrap(tmp_path, value):
    ids = IDS.astype(np.int64)
    ids[2, 3] = value
    np.save(tmp_path / "a.npy", ids)
    assert "Values must be 0 to 65535" in refusal(tmp_path / "a.npy")


@pytest.mark.filterwarnings("error")
def test_half_precision(tmp_path):
    np.save(tmp_path / "a.npy", IDS.astype(np.float16))
    check_read(tmp_path / "a.npy")


def test_ignored_values_of_16_bits_are_not_advised(tmp_path):
    """No setting ignores 65535, the value of pixels without data in maps; classes.txt can."""
    path = save(tmp_path / "a.png", np.where(IDS == 2, np.uint16(65535), IDS))
    message = refusal(path)
    assert "`ignore 65535`" in message
    assert "ignore_label=" not in message


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x93NUMPY\x01\x00\x02\x00{("])
def test_damaged_arrays_are_refused(tmp_path, content):
    (tmp_path / "a.npy").write_bytes(content)
    assert "truncated, or not a NumPy array" in refusal(tmp_path / "a.npy")


@pytest.mark.parametrize("shape", [(2**40, 2**20), (2**20, 2**20)])
def test_arrays_that_state_a_wrong_size_are_refused(tmp_path, shape):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    (tmp_path / "a.npy").write_bytes(header.getvalue())
    assert "truncated, or not a NumPy array" in refusal(tmp_path / "a.npy")


def test_archives_of_arrays_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", IDS)
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    assert "is an archive of arrays" in refusal(tmp_path / "a.npy")
    with pytest.raises(UserError, match="is an archive of arrays"):
        images.read_image(tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.jpg", {}),
        ("b.png", {"format": "JPEG"}),
        ("c.webp", {"quality": 50}),
        ("d.tif", {"compression": "jpeg"}),
    ],
)
def test_the_check_names_lossy_formats(tmp_path, name, options):
    image = save(tmp_path / "image.png", np.dstack([IDS] * 3))
    path = save(tmp_path / name, IDS, **options)
    scan = scan_pair("train", Pair("a", image, path, tmp_path), FORMAT, 3)
    assert ("jpeg mask", str(path)) in scan.remarks


@pytest.mark.parametrize(
    ("name", "options"),
    [("a.png", {}), ("b.jpg", {"format": "PNG"}), ("c.webp", {"lossless": True}), ("d.tif", {})],
)
def test_other_formats_are_not_lossy(tmp_path, name, options):
    assert not images.is_lossy(save(tmp_path / name, IDS, **options))
