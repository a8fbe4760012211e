"""Image files, as stored and as displayed, and messages about files that are not images."""

import functools
import gzip
import io
import pickle

import cv2
import numpy as np
import pytest
from PIL import Image

from deeplab_jax.data.io import images
from deeplab_jax.utils.errors import UserError

EXIF_ORIENTATION = 0x0112
RNG = np.random.default_rng(0)
read_photo = functools.partial(images.read_image, upright=True)  # as for prediction


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
    read = read_photo(save(tmp_path / f"a{suffix}", colours, **options))
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
        read = read_photo(save(tmp_path / name, colours, exif=exif, **options))
        np.testing.assert_allclose(read.astype(int), turned(colours), atol=3)


def test_transparent_pixels_become_white(tmp_path, colours):
    alpha = np.full((12, 20), 255, np.uint8)
    alpha[:6], alpha[6:, :10] = 0, 51  # a fifth
    read = read_photo(save(tmp_path / "a.png", np.dstack([colours, alpha])))
    assert np.all(read[:6] == 255)
    np.testing.assert_allclose(read[6:, :10], colours[6:, :10] * 0.2 + 255 * 0.8, atol=1)
    np.testing.assert_array_equal(read[6:, 10:], colours[6:, 10:])

    grey = np.dstack([np.full((2, 2), 100, np.uint8), np.array([[0, 255], [255, 255]], np.uint8)])
    read = read_photo(save(tmp_path / "la.png", Image.fromarray(grey, "LA")))
    np.testing.assert_array_equal(read[..., 0], [[255, 100], [100, 100]])


def test_palettes_show_their_colours_and_their_transparent_entry_white(tmp_path, colours):
    paletted = Image.fromarray(colours).quantize(4)
    entry = np.asarray(paletted)[0, 0]
    read = read_photo(save(tmp_path / "a.png", paletted))
    np.testing.assert_array_equal(read, colours)
    read = read_photo(save(tmp_path / "b.png", paletted, transparency=int(entry)))
    assert np.all(read[:6, :10] == 255)
    np.testing.assert_array_equal(read[6:], colours[6:])


def test_one_bit_and_grey_become_rgb(tmp_path):
    grey = np.arange(48, dtype=np.uint8).reshape(6, 8)
    read = read_photo(save(tmp_path / "a.png", grey))
    np.testing.assert_array_equal(read, np.dstack([grey] * 3))
    read = read_photo(save(tmp_path / "b.png", Image.fromarray(grey > 20)))
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
    np.testing.assert_array_equal(read_photo(path), expected)


def test_floating_point_in_0_to_1(tmp_path):
    values = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    read = read_photo(save(tmp_path / "a.tiff", values))
    np.testing.assert_array_equal(read[..., 2], np.rint(values * 255))
    with pytest.raises(UserError, match=r"numbers from 0 to 300, expected numbers in 0\.\.1"):
        read_photo(save(tmp_path / "b.tiff", values * 300))


@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
def test_cmyk_colours(tmp_path, colours, suffix):
    """A JPEG stores CMYK inverted, as Adobe does, and says so in an Adobe marker."""
    cmyk = Image.fromarray(colours).convert("CMYK")
    path = save(tmp_path / f"a{suffix}", cmyk, **({"quality": 100} if suffix == ".jpg" else {}))
    if suffix == ".jpg":
        assert b"Adobe" in path.read_bytes()
    np.testing.assert_allclose(read_photo(path).astype(int), colours, atol=4)


def test_of_an_animation_the_first_frame_is_taken(tmp_path, colours):
    frames = [Image.fromarray(colours), Image.fromarray(255 - colours)]
    for name in ("a.gif", "a.tiff", "a.webp"):
        options = {"lossless": True} if name == "a.webp" else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        np.testing.assert_array_equal(read_photo(tmp_path / name), colours)


def test_images_get_the_channels_of_the_model(tmp_path, colours):
    path = save(tmp_path / "a.png", colours)
    grey = read_photo(path, 1)
    assert grey.shape == (12, 20, 1)
    np.testing.assert_allclose(grey[..., 0], colours @ [0.299, 0.587, 0.114], atol=1)
    four = np.dstack([colours, np.full((12, 20), 7, np.uint8)])
    np.testing.assert_array_equal(read_photo(save(tmp_path / "b.png", four), 4), four)
    np.save(tmp_path / "c.npy", np.dstack([four, colours]))
    np.testing.assert_array_equal(read_photo(tmp_path / "c.npy", 7)[..., 4:], colours)
    with pytest.raises(UserError, match=r"a\.png: has 3 channels"):
        read_photo(path, 5)


@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (2000, 1)])
def test_any_size(tmp_path, size):
    image = np.full((*size, 3), 9, np.uint8)
    np.testing.assert_array_equal(read_photo(save(tmp_path / "a.png", image)), image)


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
    "text": ("dog.jpg\nnaïve.jpg\n".encode(), "is a text file"),
    "html": (b"<!DOCTYPE html><html>404", "is a web page"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "is an SVG drawing"),
    "noise": (bytes(range(128, 256)) * 20, "is truncated, or not in a known image format"),
}


@pytest.mark.parametrize("kind", OTHER_FILES)
def test_other_files_are_named(tmp_path, kind):
    data, message = OTHER_FILES[kind]
    path = tmp_path / "file.jpg"
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"file\.jpg: {message}"):
        read_photo(path)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".gif", ".webp", ".tif", ".bmp"])
def test_truncated_images_are_refused(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = save(tmp_path / f"a{suffix}", noise)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"a\.\w+: is truncated or damaged"):
        read_photo(path)


def test_folders_missing_files_and_giants(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory"):
        read_photo(tmp_path)
    with pytest.raises(UserError, match=r"none\.png: cannot be read \(No such file"):
        read_photo(tmp_path / "none.png")
    path = save(tmp_path / "a.png", np.zeros((30, 30), np.uint8))
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    with pytest.raises(UserError, match="too large to be decoded"):
        read_photo(path)


# Pixels as stored.


def smooth_image(height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3] that JPEG hardly changes."""
    y, x = np.mgrid[:height, :width]
    return np.stack([4 * x % 200, 3 * y % 180, (x + y) % 160], -1).astype(np.uint8)


def jpeg(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 5), (37, 64), (375, 500)])
def test_decode_image_agrees_with_pillow(height, width):
    data = jpeg(Image.fromarray(smooth_image(height, width)), quality=95)
    ours = images.decode_image(data, "a")
    theirs = np.array(Image.open(io.BytesIO(data)))
    assert ours.dtype == np.uint8
    assert ours.shape == theirs.shape
    assert np.abs(ours.astype(int) - theirs).max() <= 4


def test_decode_image_is_rgb_and_exact_for_png(tmp_path):
    image = RNG.integers(0, 256, (9, 11, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    np.testing.assert_array_equal(images.read_image(tmp_path / "a.png"), image)


def test_decode_image_makes_grey_rgb_and_keeps_opaque_pixels(tmp_path):
    grey = RNG.integers(0, 256, (6, 8), np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    rgba = RNG.integers(0, 256, (6, 8, 4), np.uint8)
    rgba[..., 3] = 255
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    from_grey = images.read_image(tmp_path / "grey.png")
    np.testing.assert_array_equal(from_grey, np.repeat(grey[..., None], 3, -1))
    from_rgba = images.read_image(tmp_path / "rgba.png")
    np.testing.assert_array_equal(from_rgba, rgba[..., :3])
    grey_jpeg = images.decode_image(jpeg(Image.fromarray(grey)), "a")
    assert grey_jpeg.shape == (6, 8, 3)


def test_decode_image_leaves_pixels_as_stored():
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6  # to be shown turned by 90 degrees
    data = jpeg(Image.fromarray(smooth_image(10, 20)), exif=exif)
    assert images.decode_image(data, "a").shape == (10, 20, 3)


@pytest.mark.parametrize("data", [b"", b"no image", b"\xff\xd8\xff\xe0"])
def test_decode_image_rejects_other_bytes(data):
    with pytest.raises(ValueError, match=r"a: is (empty|a text file|truncated)"):
        images.decode_image(data, "a")


@pytest.mark.parametrize("fraction", [0.02, 0.5, 0.9, 0.999])
def test_truncated_jpeg_is_noticed(fraction, monkeypatch):
    # OpenCV 4 decodes what there is and says nothing.
    monkeypatch.setattr(images, "_decode", lambda *_: np.zeros((90, 120, 3), np.uint8))
    data = jpeg(Image.fromarray(RNG.integers(0, 256, (90, 120, 3), np.uint8)))
    assert images.decode_image(data, "cut.jpg").shape == (90, 120, 3)
    with pytest.raises(UserError, match=r"cut\.jpg: is truncated"):
        images.decode_image(data[: int(fraction * len(data))], "cut.jpg")


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (8, 9)])
def test_small_images_are_sound(tmp_path, size):
    (tmp_path / "a.jpg").write_bytes(jpeg(Image.fromarray(smooth_image(*size))))
    assert images.read_image(tmp_path / "a.jpg").shape == (*size, 3)


# --- Sizes from headers ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tif", "bmp", "npy"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_size_in_a_header_is_that_of_the_upright_image(tmp_path, colours, kind, orientation):
    path = tmp_path / f"a.{kind}"
    if kind == "npy":
        np.save(path, colours)
    else:
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = orientation
        Image.fromarray(colours).save(path, **({} if kind == "bmp" else {"exif": exif}))
    assert images.read_size(path) == read_photo(path).shape[:2]


def test_a_png_names_its_orientation_before_or_behind_its_pixels(tmp_path, colours):
    path = tmp_path / "a.png"
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    Image.fromarray(colours).save(path, exif=exif)
    data = path.read_bytes()
    start = data.index(b"eXIf") - 4
    length = 12 + int.from_bytes(data[start : start + 4], "big")
    chunk, rest = data[start : start + length], data[:start] + data[start + length :]
    for moved in (data, rest[:-12] + chunk + rest[-12:]):  # before the last chunk, IEND
        path.write_bytes(moved)
        assert images.read_size(path) == (20, 12)
        assert read_photo(path).shape == (20, 12, 3)
    path.write_bytes(rest)
    assert images.read_size(path) == (12, 20)


def test_a_file_that_is_no_image_has_no_size(tmp_path):
    (tmp_path / "a.jpg").write_text("no image")
    (tmp_path / "a.npy").write_text("no array")
    for name in ("a.jpg", "a.npy", "none.png", "."):
        assert images.read_size(tmp_path / name) is None
