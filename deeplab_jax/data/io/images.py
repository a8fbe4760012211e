"""Image files: one reader for training, evaluation, the data check and prediction.

OpenCV decodes common files, because it is fast. Pillow decodes the others, and names problems.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import pathlib
import re
import threading
from collections.abc import Iterator

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from deeplab_jax.utils.errors import UserError

# Suffixes by which folders are searched, lower case: formats of Pillow or OpenCV, NumPy arrays.
SUFFIXES = frozenset(
    f".{kind}"
    for kind in (
        *("jpg", "jpeg", "jpe", "jfif", "png", "bmp", "tif", "tiff", "webp", "gif", "tga"),
        *("jp2", "avif", "ppm", "pgm", "pbm", "pnm", "npy"),
    )
)

MAX_PIXELS = 2**30  # OpenCV's limit; Pillow's own is a sixth of it
_OPEN_LOCK = threading.Lock()

_EXPECTED = "Expected an image: JPEG, PNG, TIFF, WebP, BMP, GIF, ..."
_VIDEO_HINT = " Extract its frames first, for example with `ffmpeg -i VIDEO frames/%05d.png`."

# Files that Pillow cannot read: offset of the signature, signature, description.
_SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    (4, b"ftypheic", "a HEIC photo (convert it to JPEG or PNG first)"),
    (4, b"ftypheix", "a HEIC photo (convert it to JPEG or PNG first)"),
    (4, b"ftypmif1", "a HEIF photo (convert it to JPEG or PNG first)"),
    (4, b"ftyp", "a video (MP4 or QuickTime)"),
    (4, b"moov", "a video (QuickTime)"),
    (0, b"\x1aE\xdf\xa3", "a video (Matroska or WebM)"),
    (8, b"AVI ", "a video (AVI)"),
    (0, b"\x00\x00\x01\xba", "a video (MPEG)"),
    (0, b"\x00\x00\x01\xb3", "a video (MPEG)"),
    (0, b"FLV", "a video (Flash)"),
    (0, b"OggS", "an Ogg video or sound"),
    (0, b"%PDF", "a PDF"),
    (0, b"PK\x03\x04", "a ZIP archive or an office document"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"\x80\x02", "a Python pickle"),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"MZ", "a Windows program"),
    (0, b"\x7fELF", "a program"),
)
# First characters, lower case, and description.
_MARKUP: tuple[tuple[bytes, str], ...] = (
    (b"<svg ", "an SVG drawing"),
    (b"<?xml", "an XML file"),
    (b"<!doctype", "a web page, not an image from it"),
    (b"<html", "a web page, not an image from it"),
)


def read_bytes(path: pathlib.Path) -> bytes:
    """Reads a file. Raises UserError if that fails."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None


def read_array(path: pathlib.Path) -> np.ndarray:
    """Reads a `.npy` file. Objects in it are refused, so nothing is executed."""
    data = read_bytes(path)
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # NumPy's parser raises errors of many types
        raise UserError(f"{path}: truncated, or not a NumPy array ({error}). Replace it.") from None
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path}: is an archive of arrays (.npz). Save one with `numpy.save`.")
    return array


def read_image(
    path: str | os.PathLike[str], num_channels: int = 3, *, upright: bool = False
) -> UInt8[np.ndarray, "h w c"]:
    """Reads the pixels of an image file, as `decode_image` defines them.

    Args:
      path: an image file, or a `.npy` file with a uint8 array `[h, w, num_channels]`.
      num_channels: see `decode_image`.
      upright: see `decode_image`.

    Raises:
      UserError: the file is missing, damaged, not an image, or has another number of channels.
    """
    path = pathlib.Path(path)
    if path.suffix.lower() != ".npy":
        return decode_image(read_bytes(path), path, num_channels, upright=upright)
    image = read_array(path)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != num_channels:
        raise UserError(
            f"{path}: must be uint8 [height, width, {num_channels}], got {image.dtype} "
            f"{list(image.shape)}. config.data.folder.channels sets the number of channels."
        )
    return image


def decode_image(
    data: bytes, name: str | os.PathLike[str], num_channels: int = 3, *, upright: bool = False
) -> UInt8[np.ndarray, "h w c"]:
    """Decodes the first frame or page of an image file.

    Transparent pixels are put on white, as viewers show them: their own colours are arbitrary.
    16-bit integers keep their upper 8 bits. Floating-point numbers must be in 0..1, and are scaled
    to 0..255.

    Args:
      data: the bytes of the file.
      name: the name of the file, for errors.
      num_channels: 3: RGB; 1: grey, to which colours are converted; 4: RGBA, not put on white. Any
        other number needs a file with as many channels, or a TIFF with one page per channel.
      upright: whether to apply an EXIF orientation, as viewers do. That of a TIFF always is.

    Raises:
      UserError: the bytes are truncated, not an image, or have another number of channels; or
        numbers are out of range.
    """
    with _decode_errors(data, name):
        image = _decode_fast(data, num_channels, name)
        if image is None:
            image = _convert(decode_8_bits(data, name), num_channels)
        turn = orientation(io.BytesIO(data)) if upright else 1
    if image.shape[2] != num_channels:
        raise UserError(
            f"{name}: has {image.shape[2]} channels, but config.data.folder.channels is "
            f"{num_channels}. For more than 4 channels, use .npy files (uint8 [height, width, "
            "channels]) or TIFFs with one page per channel."
        )
    image = image.swapaxes(0, 1) if turn > 4 else image
    image = image[::-1] if turn in (3, 4, 7, 8) else image
    return np.ascontiguousarray(image[:, ::-1] if turn in (2, 3, 6, 7) else image)


def decode_8_bits(
    data: bytes, name: str | os.PathLike[str], *, keep_grey: bool = False
) -> Image.Image:
    """Decodes an image file to 8 bits per channel; a palette or an alpha channel stays.

    Args:
      data: the bytes of the file.
      name: the name of the file, for errors.
      keep_grey: whether grey of more bits, of mode I or F, stays as it is.

    Raises:
      UserError: see `decode_image`.
    """
    with _decode_errors(data, name):
        image = _open(data)
        if isinstance(image, np.ndarray) or (image.mode[0] in "IF" and not keep_grey):
            return Image.fromarray(_to_8_bits(np.asarray(image), name))
        image.load()
        return image


def read_values(path: pathlib.Path) -> np.ndarray:
    """Reads the numbers that an image file stores: grey, colours, or indices of a palette.

    Returns:
      `[h, w]`, or `[h, w, channels]` with an alpha channel or colours.

    Raises:
      UserError: the bytes are truncated or not an image.
    """
    data = read_bytes(path)
    with _decode_errors(data, path):
        image = _open(data)
        if isinstance(image, np.ndarray):
            return image
        tile = str(image.tile)  # names the stored format, as in RGB;16B
        ppm = re.search(r"'ppm.*, (\d+)\)", tile)
        largest = int(ppm[1]) if ppm else 3 if "'L;2" in tile else 15 if "'L;4" in tile else 255
        if largest > 255 or (is_deep(image) and image.mode[0] not in "IF"):
            values = _decode(data, cv2.IMREAD_UNCHANGED)  # Pillow would scale or cut these numbers
            if values is not None:
                return values
        is_plain = image.mode not in ("CMYK", "LAB", "YCbCr")
        values = np.asarray(image if is_plain else image.convert("RGB"))
        # Pillow has scaled the numbers from 0..largest.
        return values if largest == 255 else np.rint(values * (largest / 255)).astype(np.uint8)


def is_deep(image: ImageFile.ImageFile) -> bool:
    """Whether an image that is not yet loaded stores more than 8 bits per channel."""
    return image.mode[0] in "IF" or ";16" in str(image.tile)


def is_lossy(path: pathlib.Path) -> bool:
    """Whether the format of an image changes values, as JPEG does, whatever its suffix."""
    data = read_bytes(path)
    if data.startswith(b"\x89PNG"):  # most masks, which Pillow need not open again
        return False
    try:
        with open_image(io.BytesIO(data)) as image:
            lossy_webp = image.format == "WEBP" and b"VP8L" not in data[:4096]
            is_jpeg = image.format in ("JPEG", "MPO") or image.info.get("compression") == "jpeg"
            return is_jpeg or lossy_webp or image.format == "AVIF"
    except Exception:  # not an image, for example an array
        return False


def open_image(file: pathlib.Path | io.BytesIO) -> ImageFile.ImageFile:
    """Opens an image with Pillow, without decoding it.

    Raises:
      DecompressionBombError: the image has more than 2^30 pixels.
      Exception: Pillow does not know the format, or the header is damaged.
    """
    with _OPEN_LOCK:  # Pillow's limit is a global variable
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(file)
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError(
            f"{image.width} x {image.height} pixels, at most {MAX_PIXELS}"
        )
    return image


def orientation(file: pathlib.Path | io.BytesIO) -> int:
    """Returns the EXIF orientation of an image file, 1 (as stored) if it has none.

    Decoders apply that of a TIFF, so it counts as 1.
    """
    try:
        with open_image(file) as image:
            return _orientation(image)
    except Exception:  # a format that Pillow lacks
        return 1


def _orientation(image: ImageFile.ImageFile) -> int:
    try:
        if image.format == "PNG" and image.fp:  # Pillow would decode it to find EXIF at its end
            start = image.fp.tell()
            image.fp.seek(0)
            data = image.fp.read()
            image.fp.seek(start)
            if not any(word in data for word in (b"eXIf", b"type exif", b"adobe.xmp")):
                return 1
        exif = {} if image.format == "TIFF" else image.getexif()
        return int(exif.get(ExifTags.Base.Orientation, 1))
    except Exception:  # no valid EXIF
        return 1


def read_size(path: pathlib.Path) -> tuple[int, int] | None:
    """Reads the height and width that `read_image` gives an upright image, without decoding it.

    None: the file cannot be read, or the header does not say it.
    """
    try:
        if path.suffix.lower() == ".npy":
            height, width, _ = np.load(path, mmap_mode="r", allow_pickle=False).shape
            return height, width
        with open_image(path) as image:
            width, height = image.size
            return (width, height) if _orientation(image) > 4 else (height, width)
    except Exception:  # no image, or of a format that Pillow lacks
        return None


@contextlib.contextmanager
def _decode_errors(data: bytes, name: str | os.PathLike[str]) -> Iterator[None]:
    """Turns any error of a decoder into a UserError that says what is wrong with the file."""
    try:
        yield
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"{name}: is too large to be decoded ({error}). Cut it.") from None
    except MemoryError:
        raise UserError(f"{name}: does not fit in memory. Cut it.") from None
    except UnidentifiedImageError:
        raise UserError(f"{name}: {_describe(data)}") from None
    except Exception as error:  # Pillow's many decoders raise errors of many types
        reason = str(error) or type(error).__name__
        raise UserError(f"{name}: is truncated or damaged ({reason}). Replace the file.") from None


def _describe(data: bytes) -> str:
    """Says what a file that is not an image is, and what was expected."""
    head = data[:4096]
    start = head.lstrip().lower()
    names = [name for offset, bits, name in _SIGNATURES if head[offset:].startswith(bits)]
    names += [name for prefix, name in _MARKUP if start.startswith(prefix)]
    if not data:
        names = ["empty"]
    elif not names:
        names = ["a text file" if _is_text(head) else "truncated, or not in a known image format"]
    return f"is {names[0]}. {_EXPECTED}" + (_VIDEO_HINT if "video" in names[0] else "")


def _is_text(head: bytes) -> bool:
    try:  # the last character may be cut, which an incremental decoder accepts
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character.isspace() for character in text)


def _open(data: bytes) -> ImageFile.ImageFile | np.ndarray:
    """Opens an image with Pillow, or else decodes it with OpenCV, to `[h, w]` or RGB or RGBA."""
    try:
        return open_image(io.BytesIO(data))
    except UnidentifiedImageError:  # for example a TIFF of floating-point colours
        values = _decode(data, cv2.IMREAD_UNCHANGED)
        if values is None:
            raise
        return values if values.ndim == 2 else values[..., [2, 1, 0, 3][: values.shape[2]]]


def _decode(data: bytes, flags: int) -> np.ndarray | None:
    """Decodes an image with OpenCV; None: OpenCV cannot."""
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:  # no bytes, or too many pixels
        return None


def _decode_fast(
    data: bytes, num_channels: int, name: str | os.PathLike[str]
) -> UInt8[np.ndarray, "h w c"] | None:
    """Decodes a common image with OpenCV. None: Pillow must decode it, or say what is wrong."""
    if num_channels not in (1, 3):
        return _decode_pages(data, name)
    if data[:2] == b"\xff\xd8":
        # Some versions of OpenCV fill the rest of a truncated JPEG with grey.
        is_common = b"\xff\xd9" in data[-4096:]
    else:
        try:
            header = open_image(io.BytesIO(data))
        except UnidentifiedImageError:
            return None
        is_common = (
            header.format in ("PNG", "WEBP", "BMP", "TIFF", "PPM")
            and header.mode in ("1", "L", "P", "RGB")
            and not (header.has_transparency_data or is_deep(header) or "ppm" in str(header.tile))
            and (header.format != "PNG" or b"IEND" in data[-4096:])
        )
    if not is_common:
        return None
    flags = cv2.IMREAD_GRAYSCALE if num_channels == 1 else cv2.IMREAD_COLOR
    image = _decode(data, flags | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None or num_channels == 1:
        return image if image is None else image[:, :, None]
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _decode_pages(data: bytes, name: str | os.PathLike[str]) -> UInt8[np.ndarray, "h w c"] | None:
    """Decodes the pages of a TIFF as channels; None: it has pages of colours."""
    try:
        _, pages = cv2.imdecodemulti(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None
    is_tiff = data[:2] in (b"II", b"MM")
    if is_tiff and len(pages) == 1 and pages[0].shape[2:] == (4,):
        # Pillow drops a 4th channel that is not alpha, such as infrared.
        is_alpha = "'RGBX" not in str(open_image(io.BytesIO(data)).tile)
        pages = pages if is_alpha else cv2.split(pages[0][..., [2, 1, 0, 3]])
    # Pages of colours are left to Pillow: OpenCV multiplies a TIFF's colours by its 4th channel.
    if not pages or any(page.ndim != 2 or page.shape != pages[0].shape for page in pages):
        return None
    return _to_8_bits(np.dstack(pages), name)


def _convert(image: Image.Image, num_channels: int) -> UInt8[np.ndarray, "h w c"]:
    if num_channels not in (1, 3):
        return np.atleast_3d(np.asarray(image.convert("RGBA") if num_channels == 4 else image))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    pixels = np.asarray(image.convert("RGB"))
    # As OpenCV does where it decodes the file itself.
    return pixels if num_channels == 3 else cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)[:, :, None]


def _to_8_bits(values: np.ndarray, name: str | os.PathLike[str]) -> UInt8[np.ndarray, ...]:
    """Scales floating-point numbers in 0..1 to 0..255, and takes the upper 8 of 16 bits."""
    if values.dtype == np.uint8:
        return values
    is_float = values.dtype.kind == "f"
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= (1 if is_float else 65535)):
        expected = (
            "in 0..1. Scale them to these" if is_float else "of 16 bits. Scale them to 0..65535"
        )
        raise UserError(
            f"{name}: holds numbers from {low:g} to {high:g}, expected numbers {expected}, or save "
            "the image with 8 bits per channel."
        )
    return np.rint(values * 255.0 if is_float else values >> 8).astype(np.uint8)
