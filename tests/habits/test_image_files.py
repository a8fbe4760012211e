"""Odd image files give training, prediction and the check the same pixels, or the same error."""

import pathlib
import struct
import types

import cv2
import numpy as np
import pytest
from PIL import Image

from deeplab_jax.data.dataset import Pair
from deeplab_jax.data.datasets.file_source import FileSource
from deeplab_jax.data.io import images, masks
from deeplab_jax.data.labels import named
from deeplab_jax.data_check.findings import collect
from deeplab_jax.data_check.scan import scan_pair
from deeplab_jax.inference.segmenter import Segmenter
from deeplab_jax.utils.errors import UserError

RNG = np.random.default_rng(0)
COLORS = RNG.integers(0, 256, (20, 30, 3), np.uint8)
GREY = COLORS[..., 0]
ALPHA = RNG.choice(np.array([0, 51, 255], np.uint8), (20, 30))
DEEP = RNG.integers(0, 65536, (20, 30, 3)).astype(np.uint16)
FLOATS = RNG.random((20, 30, 3)).astype(np.float32)
FORMAT = masks.MaskFormat("ids", named("a", "b"), 255)


def outcome(read):
    try:
        return read()
    except UserError as error:
        return str(error)


def agreed(path, channels=3):
    """Returns the pixels or the error that all readers agree on, and the check's findings."""
    mask = path.with_suffix(".mask.png")
    Image.fromarray(np.zeros(GREY.shape, np.uint8)).save(mask)
    pair = Pair("a", path, mask, path.parent)
    trained = outcome(lambda: FileSource([pair], FORMAT.read_label, channels)[0]["image"])
    model = types.SimpleNamespace(architecture=types.SimpleNamespace(in_channels=channels))
    predicted = outcome(lambda: Segmenter.read(model, path))
    np.testing.assert_array_equal(trained, predicted)
    findings = {
        found.kind: found for found in collect(scan_pair("", pair, FORMAT, channels).remarks, "")
    }
    assert isinstance(trained, str) == ("unreadable" in findings)
    if isinstance(trained, str):
        assert findings["unreadable"].examples[0] == trained
    return trained, findings


def save(path, image, **options):
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(path, **options)
    return path


def save_deep(path, rgb):
    raw = [cv2.IMWRITE_TIFF_COMPRESSION, 1]  # some versions would round floats
    assert cv2.imwrite(str(path), rgb[..., ::-1], raw)
    return path


def on_white(pixels):
    alpha = ALPHA[..., None] / 255
    return pixels * alpha + 255 * (1 - alpha)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp", ".tga"])
def test_transparent_colours_are_put_on_white(tmp_path, suffix):
    options = {"lossless": True, "exact": True} if suffix == ".webp" else {}
    path = save(tmp_path / f"a{suffix}", np.dstack([COLORS, ALPHA]), **options)
    pixels, findings = agreed(path)
    np.testing.assert_allclose(pixels, on_white(COLORS), atol=1)
    np.testing.assert_array_equal(pixels[ALPHA == 255], COLORS[ALPHA == 255])
    assert findings.keys() == {"transparent"}
    np.testing.assert_array_equal(agreed(path, 4)[0], np.dstack([COLORS, ALPHA]))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".tga"])
def test_transparent_grey_is_put_on_white(tmp_path, suffix, channels):
    path = save(tmp_path / f"a{suffix}", Image.fromarray(np.dstack([GREY, ALPHA]), "LA"))
    pixels, findings = agreed(path, channels)
    np.testing.assert_allclose(pixels, on_white(GREY[..., None].repeat(channels, 2)), atol=1)
    assert findings.keys() == {"transparent"}


@pytest.mark.parametrize("suffix", [".png", ".gif"])
def test_a_transparent_palette_entry_is_put_on_white(tmp_path, suffix):
    paletted = Image.fromarray(COLORS).quantize(9)
    entries = np.asarray(paletted)
    expected = np.where((entries == 4)[..., None], 255, np.asarray(paletted.convert("RGB")))
    pixels, findings = agreed(save(tmp_path / f"a{suffix}", paletted, transparency=4))
    np.testing.assert_array_equal(pixels, expected)
    assert findings.keys() == {"transparent"}


def test_a_palette_of_many_alphas(tmp_path):
    paletted = Image.fromarray(COLORS).quantize(9)
    alphas = np.array([0, 100, 200, 255, 255, 50, 255, 255, 255], np.uint8)
    alpha = alphas[np.asarray(paletted)][..., None] / 255
    expected = np.asarray(paletted.convert("RGB")) * alpha + 255 * (1 - alpha)
    pixels, _ = agreed(save(tmp_path / "a.png", paletted, transparency=alphas.tobytes()))
    np.testing.assert_allclose(pixels, expected, atol=1)


def test_a_transparent_colour(tmp_path):
    key = tuple(COLORS[0, 0].tolist())
    pixels, _ = agreed(save(tmp_path / "a.png", COLORS, transparency=key))
    expected = np.where((key == COLORS).all(-1, keepdims=True), 255, COLORS)
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_an_opaque_alpha_channel_changes_nothing(tmp_path, suffix):
    image = np.dstack([COLORS, np.full_like(ALPHA, 255)])
    pixels, findings = agreed(save(tmp_path / f"a{suffix}", image))
    np.testing.assert_array_equal(pixels, COLORS)
    assert findings == {}


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bits_keep_their_upper_8(tmp_path, suffix):
    pixels, findings = agreed(save_deep(tmp_path / f"a{suffix}", DEEP))
    np.testing.assert_array_equal(pixels, DEEP >> 8)
    assert findings.keys() == {"16 bits"}
    grey, findings = agreed(save_deep(tmp_path / f"b{suffix}", DEEP[..., :1]), 1)
    np.testing.assert_array_equal(grey, DEEP[..., :1] >> 8)
    assert findings.keys() == {"16 bits"}
    rgba = np.dstack([DEEP, np.full((20, 30), 65535, np.uint16)])[..., [2, 1, 0, 3]]
    assert cv2.imwrite(str(tmp_path / f"c{suffix}"), rgba)
    np.testing.assert_array_equal(agreed(tmp_path / f"c{suffix}")[0], DEEP >> 8)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_12_bits_in_16_give_a_warning_with_the_largest_value(tmp_path, suffix):
    pixels, findings = agreed(save_deep(tmp_path / f"a{suffix}", DEEP >> 4))
    assert pixels.max() == 15
    assert "largest value read is 15 of 255" in findings["16 bits"].examples[0]


def test_a_format_that_states_its_range_is_scaled(tmp_path):
    twelve = DEEP >> 4
    (tmp_path / "a.ppm").write_bytes(b"P6\n30 20\n4095\n" + twelve.astype(">u2").tobytes())
    pixels, findings = agreed(tmp_path / "a.ppm")
    np.testing.assert_allclose(pixels, twelve / 4095 * 255, atol=1)
    assert findings == {}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_floats_in_0_to_1_are_scaled(tmp_path, dtype):
    floats = FLOATS.astype(dtype)
    expected = np.rint(floats * 255.0)
    np.testing.assert_array_equal(agreed(save_deep(tmp_path / "a.tif", floats))[0], expected)
    pixels, findings = agreed(save_deep(tmp_path / "b.tif", floats[..., :1]))
    np.testing.assert_array_equal(pixels, expected[..., :1].repeat(3, 2))
    assert findings.keys() == {"16 bits"}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("image", [FLOATS * 255, FLOATS - 0.5, FLOATS * np.nan])
def test_other_floats_are_refused(tmp_path, image, channels):
    message, _ = agreed(save_deep(tmp_path / "a.tif", image[..., :channels]), channels)
    assert "expected numbers in 0..1" in message


def test_signed_integers_are_refused(tmp_path):
    path = save_deep(tmp_path / "a.tif", DEEP[..., :1].astype(np.int16))
    assert "expected numbers of 16 bits" in agreed(path)[0]


def test_floating_point_pages_are_scaled_too(tmp_path):
    pages = [Image.fromarray(FLOATS[..., index % 3]) for index in range(5)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    pixels, _ = agreed(tmp_path / "a.tif", 5)
    np.testing.assert_array_equal(pixels, np.rint(FLOATS * 255)[..., [0, 1, 2, 0, 1]])


@pytest.mark.parametrize("suffix", [".tga", ".ppm", ".gif", ".jp2", ".bmp", ".jpg"])
def test_ordinary_files_of_all_formats_are_sound(tmp_path, suffix):
    pixels, findings = agreed(save(tmp_path / f"a{suffix}", Image.new("RGB", (30, 20), "red")))
    np.testing.assert_allclose(pixels.astype(int), np.full((20, 30, 3), (255, 0, 0)), atol=3)
    assert findings == {}


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB"])
def test_other_colour_spaces(tmp_path, mode):
    agreed(save(tmp_path / "a.tif", Image.fromarray(COLORS).convert(mode)))


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".tga"])
def test_images_beyond_pillows_limit_are_read(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    path = save(tmp_path / f"a{suffix}", COLORS)
    assert agreed(path)[0].shape == COLORS.shape
    assert Image.MAX_IMAGE_PIXELS == 100
    monkeypatch.setattr(images, "MAX_PIXELS", 599)
    if suffix != ".jpg":
        assert "too large to be decoded (30 x 20 pixels, at most 599)" in agreed(path)[0]


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp", ".bmp", ".tga"])
def test_truncated_files_are_refused(tmp_path, suffix):
    path = save(tmp_path / f"a{suffix}", COLORS)
    path.write_bytes(path.read_bytes()[:-60])
    assert "is truncated" in agreed(path)[0]


def test_prediction_turns_photos_that_training_reads_as_stored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = images.read_image(save(tmp_path / "a.png", COLORS, exif=exif))
    np.testing.assert_array_equal(stored, COLORS)
    upright = images.read_image(tmp_path / "a.png", upright=True)
    np.testing.assert_array_equal(upright, np.rot90(COLORS, -1))


def test_the_orientation_of_a_tiff_is_always_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    pixels, findings = agreed(save(tmp_path / "a.tif", COLORS, exif=exif))
    np.testing.assert_array_equal(pixels, COLORS[::-1, ::-1])
    assert findings == {}
    save(tmp_path / "mask.tif", GREY, exif=exif)
    np.testing.assert_array_equal(masks.read_ids(tmp_path / "mask.tif"), GREY[::-1, ::-1])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_fourth_channel_that_is_not_alpha(tmp_path, dtype):
    """A TIFF of red, green, blue and infrared, whose tag ExtraSamples (338) says unspecified."""
    four = np.dstack([DEEP, DEEP[::-1, :, 0]])
    four = four if dtype == np.uint16 else (four >> 8).astype(np.uint8)
    entries = [
        *((256, 3, 1, 30), (257, 3, 1, 20), (258, 3, 4, 8), (259, 3, 1, 1), (262, 3, 1, 2)),
        *((273, 4, 1, 16), (277, 3, 1, 4), (278, 3, 1, 20), (279, 4, 1, four.nbytes)),
        (338, 3, 1, 0),
    ]
    entries = [struct.pack("<HHII", *entry) for entry in entries]
    head = (
        b"II*\0"
        + struct.pack("<I", 16 + four.nbytes)
        + struct.pack("<4H", *[8 * four.itemsize] * 4)
    )
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    (tmp_path / "a.tif").write_bytes(head + four.tobytes() + directory)
    expected = DEEP >> 8
    np.testing.assert_array_equal(agreed(tmp_path / "a.tif")[0], expected)
    four_read, _ = agreed(tmp_path / "a.tif", 4)
    np.testing.assert_array_equal(four_read, np.dstack([expected, expected[::-1, :, 0]]))


def test_files_without_a_pixel_format_are_named(tmp_path):
    path = pathlib.Path(tmp_path / "a.tif")
    path.write_bytes(b"II*\0" + bytes(200))
    assert "is truncated" in agreed(path)[0]
