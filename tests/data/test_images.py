"""Reading images that people have: what they look like, and what is said of other files."""

import gzip
import pickle

import cv2
import numpy as np
import pytest
from PIL import Image

from deeplab_jax.data.io import images
from deeplab_jax.utils.errors import UserError

EXIF_ORIENTATION = 0x0112


@pytest.fixture
def colours():
    """uint8 [12, 20, 3]: four quarters in colours of their own, so that no turn is unseen."""
    image = np.empty((12, 20, 3), np.uint8)
    image[:6, :10], image[:6, 10:] = (250, 10, 20), (15, 240, 30)
    image[6:, :10], image[6:, 10:] = (25, 35, 230), (200, 190, 40)
    return image


def save(path, image, **options):
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(path, **options)
    return path


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".ppm", ".tga", ".webp", ".gif"])
def test_lossless_formats_are_exact(tmp_path, colours, suffix):
    options = {"lossless": True} if suffix == ".webp" else {}
    read = images.read_image(save(tmp_path / f"a{suffix}", colours, **options))
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, colours)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, colours, orientation):
    turned = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: np.rot90(x, -1),
        7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
        8: lambda x: np.rot90(x),
    }[orientation]
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    for name, options in (("a.png", {}), ("a.jpg", {"quality": 100, "subsampling": 0})):
        read = images.read_image(save(tmp_path / name, colours, exif=exif, **options))
        np.testing.assert_allclose(read.astype(int), turned(colours), atol=3)


def test_what_is_transparent_shows_white(tmp_path, colours):
    alpha = np.full((12, 20), 255, np.uint8)
    alpha[:6], alpha[6:, :10] = 0, 51  # a fifth
    read = images.read_image(save(tmp_path / "a.png", np.dstack([colours, alpha])))
    assert np.all(read[:6] == 255)
    np.testing.assert_allclose(read[6:, :10], colours[6:, :10] * 0.2 + 255 * 0.8, atol=1)
    np.testing.assert_array_equal(read[6:, 10:], colours[6:, 10:])

    grey = np.dstack([np.full((2, 2), 100, np.uint8), np.array([[0, 255], [255, 255]], np.uint8)])
    read = images.read_image(save(tmp_path / "la.png", Image.fromarray(grey, "LA")))
    np.testing.assert_array_equal(read[..., 0], [[255, 100], [100, 100]])


def test_palettes_show_their_colours_and_their_transparent_entry_white(tmp_path, colours):
    paletted = Image.fromarray(colours).quantize(4)
    entry = np.asarray(paletted)[0, 0]
    read = images.read_image(save(tmp_path / "a.png", paletted))
    np.testing.assert_array_equal(read, colours)
    read = images.read_image(save(tmp_path / "b.png", paletted, transparency=int(entry)))
    assert np.all(read[:6, :10] == 255)
    np.testing.assert_array_equal(read[6:], colours[6:])


def test_one_bit_and_grey_become_rgb(tmp_path):
    grey = np.arange(48, dtype=np.uint8).reshape(6, 8)
    read = images.read_image(save(tmp_path / "a.png", grey))
    np.testing.assert_array_equal(read, np.dstack([grey] * 3))
    read = images.read_image(save(tmp_path / "b.png", Image.fromarray(grey > 20)))
    np.testing.assert_array_equal(read[..., 1], np.where(grey > 20, 255, 0))


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_of_16_bits_the_upper_8_are_taken(tmp_path, suffix, channels):
    rng = np.random.default_rng(0)
    deep = rng.integers(0, 65536, (5, 7, channels)).astype(np.uint16)
    deep[0, 0], deep[0, 1] = 0, 65535
    if channels == 4:
        deep[..., 3] = 65535
    path = tmp_path / f"a{suffix}"
    cv2.imwrite(str(path), deep)
    expected = (deep >> 8)[..., :3]
    expected = expected[..., ::-1] if channels > 1 else np.repeat(expected, 3, axis=2)
    np.testing.assert_array_equal(images.read_image(path), expected)


def test_floating_point_in_0_to_1(tmp_path):
    values = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    read = images.read_image(save(tmp_path / "a.tiff", values))
    np.testing.assert_array_equal(read[..., 2], np.rint(values * 255))
    with pytest.raises(UserError, match=r"numbers from 0 to 300, expected numbers in 0\.\.1"):
        images.read_image(save(tmp_path / "b.tiff", values * 300))


@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
def test_cmyk_has_its_colours(tmp_path, colours, suffix):
    """A JPEG stores CMYK inverted, as Adobe does, and says so in an Adobe marker."""
    cmyk = Image.fromarray(colours).convert("CMYK")
    path = save(tmp_path / f"a{suffix}", cmyk, **({"quality": 100} if suffix == ".jpg" else {}))
    if suffix == ".jpg":
        assert b"Adobe" in path.read_bytes()
    np.testing.assert_allclose(images.read_image(path).astype(int), colours, atol=4)


def test_of_an_animation_the_first_frame_is_taken(tmp_path, colours):
    frames = [Image.fromarray(colours), Image.fromarray(255 - colours)]
    for name in ("a.gif", "a.tiff", "a.webp"):
        options = {"lossless": True} if name == "a.webp" else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        np.testing.assert_array_equal(images.read_image(tmp_path / name), colours)


def test_models_of_other_channels_get_theirs(tmp_path, colours):
    path = save(tmp_path / "a.png", colours)
    grey = images.read_image(path, 1)
    assert grey.shape == (12, 20, 1)
    np.testing.assert_allclose(grey[..., 0], colours @ [0.299, 0.587, 0.114], atol=1)
    four = np.dstack([colours, np.full((12, 20), 7, np.uint8)])
    np.testing.assert_array_equal(images.read_image(save(tmp_path / "b.png", four), 4), four)
    np.save(tmp_path / "c.npy", np.dstack([four, colours]))
    np.testing.assert_array_equal(images.read_image(tmp_path / "c.npy", 7)[..., 4:], colours)
    with pytest.raises(UserError, match=r"a\.png: has 3 channels"):
        images.read_image(path, 5)


@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (2000, 1)])
def test_any_size(tmp_path, size):
    image = np.full((*size, 3), 9, np.uint8)
    np.testing.assert_array_equal(images.read_image(save(tmp_path / "a.png", image)), image)


OTHER_FILES = {
    "empty": (b"", "is empty. Expected an image: JPEG"),
    "mp4": (b"\0\0\0\x20ftypisom\0\0\x02\0", r"is a video \(MP4.*ffmpeg"),
    "mkv": (b"\x1aE\xdf\xa3\x01", r"is a video \(Matroska"),
    "avi": (b"RIFF\x24\0\0\0AVI LIST", r"is a video \(AVI"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0", "is a HEIC photo .convert it to JPEG"),
    "pdf": (b"%PDF-1.7\n", "is a PDF"),
    "zip": (b"PK\x03\x04\x14\0", "is a ZIP archive"),
    "gzip": (gzip.compress(b"x"), "is a gzip archive"),
    "pickle": (pickle.dumps({"a": 1}, protocol=2), "is a Python pickle"),
    "text": ("dog.jpg\nnaïve.jpg\n".encode(), "is a text"),
    "html": (b"<!DOCTYPE html><html>404", "is a web page"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "is a drawing"),
    "noise": (bytes(range(128, 256)) * 20, "is no image that is known here"),
}


@pytest.mark.parametrize("kind", OTHER_FILES)
def test_other_files_are_named(tmp_path, kind):
    data, message = OTHER_FILES[kind]
    path = tmp_path / "file.jpg"
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"file\.jpg: {message}"):
        images.read_image(path)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".gif", ".webp", ".tif", ".bmp"])
def test_truncated_images_are_refused(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = save(tmp_path / f"a{suffix}", noise)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"a\.\w+: is a truncated or damaged image"):
        images.read_image(path)


def test_folders_missing_files_and_giants(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"is a folder\. Expected an image"):
        images.read_image(tmp_path)
    with pytest.raises(UserError, match=r"none\.png: cannot be read \(No such file"):
        images.read_image(tmp_path / "none.png")
    path = save(tmp_path / "a.png", np.zeros((30, 30), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match="too large to be decoded"):
        images.read_image(path)
