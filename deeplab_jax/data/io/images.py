"""Reading the images that people have, for prediction, and saying what a file is that is none.

The images of training have masks and are read as they are stored (`data.io.reading`). Here a photo
is turned as its EXIF entry says, and comes as it looks on a white page.
"""

from __future__ import annotations

import io
import os
import pathlib
import warnings

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from deeplab_jax.data.datasets import layout
from deeplab_jax.data.io import reading
from deeplab_jax.utils.errors import UserError

# Taken from a folder; a file that is named is read whatever its suffix.
SUFFIXES = layout.SUFFIXES | {".jfif"}
_EXPECTED = "Expected an image: JPEG, PNG, TIFF, WebP, BMP, GIF, ..."

# What begins with these bytes at this place, and is no image that Pillow reads.
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
    (0, b"PK\x03\x04", "a ZIP archive, or a document in one"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"\x80\x02", "a Python pickle"),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"MZ", "a Windows program"),
    (0, b"\x7fELF", "a program"),
)
_VIDEO_HINT = " Extract its frames first, with `ffmpeg -i VIDEO frames/%05d.png` say."


def read_image(
    path: str | os.PathLike[str], num_channels: int = 3
) -> UInt8[np.ndarray, "h w channels"]:
    """The pixels of an image file as a viewer shows them.

    The EXIF orientation is applied. What is transparent shows white. Grey and palettes become RGB;
    so does CMYK, without a colour profile; of 16 bits the upper 8 are taken, and numbers in 0..1 of
    a floating-point TIFF become 0..255. Of an animation or several pages the first is taken.

    Args:
      path: of the file.
      num_channels: of the model. 3: RGB. 1: grey. Others: channels as they are stored, see
        `data.io.reading.read_image`, which also reads NumPy's `.npy` of any number of channels.

    Raises:
      UserError: saying what the file is, if it is no image, or that it is damaged.
    """
    path = pathlib.Path(path)
    data = _read(path)
    if path.suffix.lower() == ".npy" or num_channels not in (1, 3):
        return reading.read_image(path, num_channels)
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as file:
            warnings.simplefilter("ignore")  # of size, and of odd but harmless entries
            image = ImageOps.exif_transpose(file)
            shown = _on_white(_to_8_bits(image, path))
            pixels = np.asarray(shown.convert("L" if num_channels == 1 else "RGB"))
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: is too large to be decoded ({error}). Cut it.") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"{path}: {what_it_is(data)}") from None
    except Exception as error:  # Pillow raises what its many decoders raise
        raise UserError(
            f"{path}: is a truncated or damaged image ({error}). Replace the file."
        ) from None
    return pixels.reshape(*pixels.shape[:2], num_channels)


def what_it_is(data: bytes) -> str:
    """A sentence on bytes that are no image, and what was expected."""
    if not data:
        return f"is empty. {_EXPECTED}"
    for place, signature, name in _SIGNATURES:
        if data[place:].startswith(signature):
            return f"is {name}. {_EXPECTED}" + (_VIDEO_HINT if "video" in name else "")
    head = data[:4096]
    if head.lstrip()[:5].lower() in (b"<svg ", b"<?xml"):
        return f"is a drawing or text in XML. {_EXPECTED}"
    if head.lstrip()[:9].lower() in (b"<!doctype", b"<html"):
        return f"is a web page, not the image it may have shown. {_EXPECTED}"
    if _is_text(head):
        return f"is a text. {_EXPECTED}"
    return f"is no image that is known here. {_EXPECTED}"


def _is_text(head: bytes) -> bool:
    # A character may be cut at the end.
    text = head.decode("utf-8", "ignore")
    return len(text.encode()) >= len(head) - 3 and all(c.isprintable() or c.isspace() for c in text)


def _read(path: pathlib.Path) -> bytes:
    if path.is_dir():
        raise UserError(f"{path}: is a folder. {_EXPECTED}")
    return reading.read_bytes(path)


def _to_8_bits(image: Image.Image, path: pathlib.Path) -> Image.Image:
    """An image of more bits as a grey one of 8; Pillow itself would cut off what is above 255."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    if image.mode == "F":
        values, limit, expected = values * 255.0, 255.0, "numbers in 0..1"
    else:
        values, limit, expected = values // 256, 255, "whole numbers of 16 bits"
    if not (np.all(values >= 0) and np.all(values <= limit)):
        raise UserError(
            f"{path}: holds numbers from {np.asarray(image).min():g} to "
            f"{np.asarray(image).max():g}, expected {expected}. Save it with 8 bits a channel."
        )
    return Image.fromarray(np.rint(values).astype(np.uint8))


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
