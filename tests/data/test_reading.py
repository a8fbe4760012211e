"""Reading of images and masks: exact where it must be, and no broken file passes the checks."""

import io
import pathlib
import struct
import zlib

import numpy as np
import pytest
import scipy.io
from PIL import Image

from deeplab_jax.data.io import reading
from deeplab_jax.data.labels import IGNORE, VOC
from deeplab_jax.utils.errors import UserError

RNG = np.random.default_rng(0)


def smooth_image(height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3] that JPEG hardly changes."""
    y, x = np.mgrid[:height, :width]
    return np.stack([4 * x % 200, 3 * y % 180, (x + y) % 160], -1).astype(np.uint8)


def write_pair(folder: pathlib.Path, image: np.ndarray, ids: np.ndarray) -> reading.Pair:
    Image.fromarray(image).save(folder / "image.png")
    Image.fromarray(ids).save(folder / "mask.png")
    return reading.Pair("pair", folder / "image.png", folder / "mask.png", folder)


def jpeg(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


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


@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 5), (37, 64), (375, 500)])
def test_decode_image_agrees_with_pillow(height, width):
    data = jpeg(Image.fromarray(smooth_image(height, width)), quality=95)
    ours = reading.decode_image(data)
    theirs = np.array(Image.open(io.BytesIO(data)))
    assert ours.dtype == np.uint8
    assert ours.shape == theirs.shape
    assert np.abs(ours.astype(int) - theirs).max() <= 4


def test_decode_image_is_rgb_and_exact_for_png(tmp_path):
    image = RNG.integers(0, 256, (9, 11, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    np.testing.assert_array_equal(reading.decode_image((tmp_path / "a.png").read_bytes()), image)


def test_decode_image_makes_grey_rgb_and_drops_alpha(tmp_path):
    grey = RNG.integers(0, 256, (6, 8), np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    rgba = RNG.integers(0, 256, (6, 8, 4), np.uint8)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    from_grey = reading.decode_image((tmp_path / "grey.png").read_bytes())
    np.testing.assert_array_equal(from_grey, np.repeat(grey[..., None], 3, -1))
    from_rgba = reading.decode_image((tmp_path / "rgba.png").read_bytes())
    np.testing.assert_array_equal(from_rgba, rgba[..., :3])
    grey_jpeg = reading.decode_image(jpeg(Image.fromarray(grey)))
    assert grey_jpeg.shape == (6, 8, 3)
    assert reading.check_image(tmp_path / "grey.png") == (6, 8)


def test_decode_image_leaves_pixels_as_stored():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    data = jpeg(Image.fromarray(smooth_image(10, 20)), exif=exif)
    assert reading.decode_image(data).shape == (10, 20, 3)


@pytest.mark.parametrize("data", [b"", b"no image", b"\xff\xd8\xff\xe0"])
def test_decode_image_rejects_other_bytes(data):
    with pytest.raises(ValueError, match="not an image"):
        reading.decode_image(data)


@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (375, 500)])
def test_labels_survive_storage(shape):
    label = RNG.integers(0, 256, shape, np.uint8)
    np.testing.assert_array_equal(reading.decode_label(reading.encode_label(label)), label)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9, 0.999])
def test_truncated_jpeg_is_noticed(tmp_path, share, monkeypatch):
    # OpenCV 4 decodes what there is and says nothing.
    monkeypatch.setattr(reading, "decode_image", lambda data: np.zeros((90, 120, 3), np.uint8))
    path = tmp_path / "cut.jpg"
    data = jpeg(Image.fromarray(RNG.integers(0, 256, (90, 120, 3), np.uint8)))
    path.write_bytes(data)
    assert reading.check_image(path) == (90, 120)
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(UserError, match=r"cut\.jpg: truncated, or no image"):
        reading.check_image(path)


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (8, 9)])
def test_small_images_are_sound(tmp_path, size):
    (tmp_path / "a.jpg").write_bytes(jpeg(Image.fromarray(smooth_image(*size))))
    assert reading.check_image(tmp_path / "a.jpg") == size


def test_truncated_png_is_noticed(tmp_path):
    Image.fromarray(RNG.integers(0, 21, (50, 60), np.uint8)).save(tmp_path / "cut.png")
    data = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"cut\.png: truncated, or no image"):
        reading.read_ids(tmp_path / "cut.png")
    with pytest.raises(UserError, match=r"cut\.png: truncated, or no image"):
        reading.check_image(tmp_path / "cut.png")


def test_palette_masks_give_ids_not_colors(tmp_path):
    ids = RNG.choice(np.array([0, 1, 5, 20, 255], np.uint8), (12, 10))
    mask = Image.fromarray(ids).convert("P")
    mask.putpalette(VOC.palette().tobytes())
    mask.save(tmp_path / "mask.png")
    assert Image.open(tmp_path / "mask.png").mode == "P"
    np.testing.assert_array_equal(reading.read_ids(tmp_path / "mask.png"), ids)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_masks_of_few_bits_keep_their_ids(tmp_path, bits):
    ids = RNG.integers(0, min(2**bits, 21), (5, 13))
    (tmp_path / "mask.png").write_bytes(grey_png(ids, bits))
    np.testing.assert_array_equal(reading.read_ids(tmp_path / "mask.png"), ids)


def test_masks_of_16_bits_keep_their_ids(tmp_path):
    ids = np.array([[0, 300], [20, 65535]], np.uint16)
    Image.fromarray(ids).save(tmp_path / "mask.png")
    np.testing.assert_array_equal(reading.read_ids(tmp_path / "mask.png"), ids)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_colors_are_no_ids(tmp_path, mode):
    Image.new(mode, (4, 3)).save(tmp_path / "mask.png")
    with pytest.raises(UserError, match=rf"mask\.png: holds colours.*mode {mode}\).*palette PNG"):
        reading.read_ids(tmp_path / "mask.png")


@pytest.mark.parametrize("dtype", [np.uint8, np.float64])
def test_sbd_masks(tmp_path, dtype):
    ids = RNG.integers(0, 21, (6, 9)).astype(dtype)
    scipy.io.savemat(tmp_path / "a.mat", {"GTcls": {"Segmentation": ids, "Boundaries": [1, 2]}})
    np.testing.assert_array_equal(reading.read_ids(tmp_path / "a.mat"), ids)


@pytest.mark.parametrize(
    "variables",
    [{"other": 1}, {"GTcls": 3}, {"GTcls": {"Boundaries": 1}}, {"GTinst": {"Segmentation": 1}}],
)
def test_mat_without_ground_truth(tmp_path, variables):
    scipy.io.savemat(tmp_path / "a.mat", variables)
    with pytest.raises(UserError, match=r"a\.mat: has no GTcls\.Segmentation.*dataset/cls"):
        reading.read_ids(tmp_path / "a.mat")


@pytest.mark.parametrize("ids", [np.full((2, 2), 0.5), np.zeros((2, 2, 2))])
def test_mat_without_whole_numbers(tmp_path, ids):
    scipy.io.savemat(tmp_path / "a.mat", {"GTcls": {"Segmentation": ids}})
    with pytest.raises(UserError, match=r"a\.mat: GTcls\.Segmentation is not a matrix"):
        reading.read_ids(tmp_path / "a.mat")


def test_broken_mat(tmp_path):
    scipy.io.savemat(tmp_path / "a.mat", {"GTcls": {"Segmentation": np.zeros((40, 40))}})
    data = (tmp_path / "a.mat").read_bytes()
    (tmp_path / "a.mat").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"a\.mat: truncated, or no MATLAB file"):
        reading.read_ids(tmp_path / "a.mat")


@pytest.mark.parametrize("ignore_label", [255, 11, 0, 3])
def test_ignore_label_is_mapped(ignore_label):
    num_classes = 11
    ids = np.array([[0, 1, 3], [10, ignore_label, ignore_label]])
    label = reading.to_label(ids, num_classes, ignore_label, pathlib.Path("m.png"))
    expected = [[IGNORE if i == ignore_label else i for i in row] for row in ids.tolist()]
    assert label.dtype == np.uint8
    assert label.tolist() == expected


def test_foreign_ids_are_named_and_counted():
    ids = np.array([[0, 57, 57], [255, 21, 20]])
    with pytest.raises(UserError) as raised:
        reading.to_label(ids, 21, 255, pathlib.Path("some/m.png"))
    message = str(raised.value)
    assert "some/m.png" in message
    assert "id 21 (1 pixels), id 57 (2 pixels)" in message
    assert "0 to 20" in message
    assert "ignore label 255" in message


def test_255_is_foreign_where_another_label_is_ignored():
    with pytest.raises(UserError, match=r"id 255 \(1 pixels\).*ignore label 11"):
        reading.to_label(np.array([[255, 0]]), 11, 11, pathlib.Path("m.png"))


def test_many_foreign_ids_are_summed_up():
    with pytest.raises(UserError, match=r"id 34 \(1 pixels\) and 35 other ids"):
        reading.to_label(np.arange(70)[None], 30, 255, pathlib.Path("m.png"))


def test_read_label(tmp_path):
    ids = RNG.choice(np.array([0, 7, 255], np.uint8), (13, 17))
    pair = write_pair(tmp_path, smooth_image(13, 17), ids)
    np.testing.assert_array_equal(reading.read_label(pair, 8, 255), ids)


def test_mask_of_another_size_names_both(tmp_path):
    pair = write_pair(tmp_path, smooth_image(13, 17), np.zeros((17, 13), np.uint8))
    with pytest.raises(UserError, match=r"mask\.png: is 13 x 17 .*image\.png is 17 x 13\. A mask"):
        reading.read_label(pair, 8, 255)


def test_a_turned_image_is_explained(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    pair = write_pair(tmp_path, smooth_image(13, 17), np.zeros((17, 13), np.uint8))
    Image.fromarray(smooth_image(13, 17)).save(pair.image, exif=exif)
    with pytest.raises(UserError, match=r"as stored \(to be shown turned: EXIF 6\)"):
        reading.read_label(pair, 8, 255)


@pytest.mark.parametrize("file", ["image.png", "mask.png"])
def test_a_missing_file_names_what_lists_it(tmp_path, file):
    pair = write_pair(tmp_path, smooth_image(3, 4), np.zeros((3, 4), np.uint8))
    (tmp_path / file).unlink()
    with pytest.raises(UserError) as raised:
        reading.read_label(pair, 8, 255)
    assert str(raised.value) == f"{tmp_path / file}: is missing, yet {tmp_path} names pair."


def test_check_all_keeps_the_order_and_tells_all_problems(capsys):
    def check(item: int) -> int:
        if item % 2:
            raise UserError(f"item {item} is odd")
        return item * item

    assert reading.check_all(check, range(0, 50, 2), "Checking") == [i * i for i in range(0, 50, 2)]
    with pytest.raises(UserError) as raised:
        reading.check_all(check, range(26), "Checking")
    odd = [f"- item {i} is odd" for i in range(1, 20, 2)]
    assert str(raised.value).splitlines() == ["Checking: 13 problems", *odd, "- and 3 more"]
    assert capsys.readouterr().out == ""


def test_check_all_lets_other_errors_through():
    def check(item: int) -> int:
        return 1 // item

    with pytest.raises(ZeroDivisionError):
        reading.check_all(check, [1, 0], "Checking")


def test_one_problem():
    reading.raise_together("Checking", [])
    with pytest.raises(UserError, match=r"^Checking: 1 problem\n- it$"):
        reading.raise_together("Checking", ["it"])
