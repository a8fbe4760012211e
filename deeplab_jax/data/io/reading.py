"""Reading images and masks: fast decoding for training, and the checks that come before it.

Training decodes with OpenCV, which is fast and says little. So each file of a data set that is
prepared is checked once, then, and every problem is told together: training never meets a bad
file. Files that are read where they lie are checked by `deeplab-jax data check`.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import io
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import cv2
import numpy as np
from jaxtyping import Integer, UInt8
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import track

from deeplab_jax.data.labels import IGNORE
from deeplab_jax.utils.errors import UserError

MAX_PROBLEMS_TOLD = 10

# Pillow spreads the ids of a grey PNG of 2 or 4 bits a pixel over 0..255, by these factors.
_PNG_GREY_SPREAD = {2: 85, 4: 17}
_EXIF_ORIENTATION = 0x0112

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class ColorsError(UserError):
    """A mask holds colours where class ids are expected."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """The files of one example.

    Attributes:
      name: what the example is called.
      image: a JPEG, PNG or other image file.
      mask: a file of class ids: a grey or palette image, or SBD's `.mat`.
      listed_in: the file or folder that says that there is this example.
    """

    name: str
    image: pathlib.Path
    mask: pathlib.Path
    listed_in: pathlib.Path


def decode_image(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """The RGB image in the bytes of an image file; grey becomes RGB, an alpha channel is dropped.

    Pixels are in the order in which they are stored: an EXIF orientation is not applied, as masks
    have none.

    Raises:
      ValueError: the bytes are no image.
    """
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    return cv2.cvtColor(_decode(data, flags), cv2.COLOR_BGR2RGB)


def read_image(path: pathlib.Path, num_channels: int = 3) -> UInt8[np.ndarray, "h w c"]:
    """The pixels of a file, in the order in which they are stored.

    Args:
      path: an image; or a NumPy array in `.npy`, uint8 `[h, w, num_channels]`.
      num_channels: 3: RGB; 1: grey, to which colours are converted; 4: RGBA, or as others: a
        `.npy`, or a TIFF with a page a channel. Of 16 bits the upper 8 are taken.

    Raises:
      UserError: the file is missing or damaged, no image, or has other channels.
    """
    if path.suffix.lower() == ".npy":
        return _array_image(path, num_channels)
    data = read_bytes(path)
    if _ends_early(data):
        _decode_with_pillow(data, path)
    try:
        if num_channels == 3:
            return decode_image(data)
        if num_channels == 1:
            return _decode(data, cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION)[:, :, None]
        image = _decode_pages(data)
    except ValueError:
        # A format that OpenCV lacks, or an error that Pillow knows to name.
        mode = {1: "L", 3: "RGB", 4: "RGBA"}.get(num_channels)
        picture = _decode_with_pillow(data, path)
        image = np.atleast_3d(np.asarray(picture.convert(mode) if mode else picture))
    if image.shape[2] != num_channels:
        raise UserError(
            f"{path}: has {image.shape[2]} channels, but config.data.folder.channels is "
            f"{num_channels}. More than 4 channels are read from .npy files, uint8 [height, width, "
            "channels], and from TIFFs that have a page a channel."
        )
    return image


def _array_image(path: pathlib.Path, num_channels: int) -> np.ndarray:
    image = read_array(path)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != num_channels:
        raise UserError(
            f"{path}: must be uint8 [height, width, {num_channels}], got {image.dtype} "
            f"{list(image.shape)}. The number of channels is config.data.folder.channels."
        )
    return image


def _decode(data: bytes, flags: int) -> np.ndarray:
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None
    if image is None:
        raise ValueError("not an image that OpenCV can decode")
    return image


def _decode_pages(data: bytes) -> UInt8[np.ndarray, "h w c"]:
    """The pages of a TIFF, each a channel."""
    found, pages = (
        cv2.imdecodemulti(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if data
        else (False, ())
    )
    # What has colours is left to Pillow: OpenCV multiplies those of a TIFF by its fourth channel.
    if not found or any(page.ndim != 2 or page.shape != pages[0].shape for page in pages):
        raise ValueError("not pages of one channel each")
    image = np.dstack(pages)
    return np.right_shift(image, 8).astype(np.uint8) if image.dtype == np.uint16 else image


def _ends_early(data: bytes) -> bool:
    """Whether the end of a JPEG is not where it is in most; some versions of OpenCV fill it up."""
    return data[:2] == b"\xff\xd8" and b"\xff\xd9" not in data[-4096:]


def read_array(path: pathlib.Path) -> np.ndarray:
    """The array in a `.npy` file; nothing in it is executed."""
    try:
        return np.load(io.BytesIO(read_bytes(path)), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"{path}: truncated, or no NumPy array ({error}). Replace it.") from None


def encode_label(label: UInt8[np.ndarray, "h w"]) -> bytes:
    """Grey 8-bit PNG, lossless, which `decode_label` reads."""
    return cv2.imencode(".png", label)[1].tobytes()


def decode_label(data: bytes) -> UInt8[np.ndarray, "h w"]:
    """The ids in a grey 8-bit PNG. Not for masks from elsewhere, for which see `read_ids`."""
    label = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE) if data else None
    if label is None:
        raise ValueError("not a label that encode_label wrote")
    return label


def check_image(path: pathlib.Path) -> tuple[int, int]:
    """Decodes an image file and sees that it is whole.

    Pillow notices a truncated file, which some versions of OpenCV fill with grey and call read.

    Returns:
      Its height and width, pixels, as stored.

    Raises:
      UserError: the file is missing, truncated or no image.
    """
    return check_image_data(read_bytes(path), str(path))


def check_image_data(data: bytes, name: str) -> tuple[int, int]:
    """As `check_image`, of what an image file holds; `name` is for the error."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            # Lets libjpeg decode an eighth of the size: all bytes are read, in half the time.
            image.draft(None, (image.width // 8 or 1, image.height // 8 or 1))
            image.load()
        return decode_image(data).shape[:2]
    except Exception as error:  # Pillow raises what its many decoders raise
        raise UserError(
            f"{name}: truncated, or no image ({_reason(error)}). Replace the file."
        ) from None


def read_ids(path: pathlib.Path) -> Integer[np.ndarray, "h w"]:
    """The class ids of a mask file: a grey or palette image, a `.npy`, or a `.mat` of SBD.

    Raises:
      UserError: the file is missing, truncated, or holds colours rather than ids.
    """
    if path.suffix == ".mat":
        return _read_sbd_ids(path)
    if path.suffix.lower() == ".npy":
        return _read_array_ids(path)
    return _read_image_ids(path)


def _read_array_ids(path: pathlib.Path) -> np.ndarray:
    ids = read_array(path)
    if ids.ndim != 2 or not (np.issubdtype(ids.dtype, np.integer) or ids.dtype == bool):
        raise UserError(
            f"{path}: must hold whole numbers [height, width], got {ids.dtype} {list(ids.shape)}"
        )
    return ids.astype(np.int32)


def read_picture(path: pathlib.Path) -> Image.Image:
    """An image file as Pillow decodes it: a palette stays one.

    Raises:
      UserError: the file is missing, truncated or no image.
    """
    return _decode_with_pillow(read_bytes(path), path)


def _decode_with_pillow(data: bytes, path: pathlib.Path) -> Image.Image:
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return image
    except Exception as error:  # Pillow raises what its many decoders raise
        raise UserError(
            f"{path}: truncated, or no image ({_reason(error)}). Replace the file."
        ) from None


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its message names an object in memory
        return "its bytes are of no known format"
    return str(error) or type(error).__name__


def _read_image_ids(path: pathlib.Path) -> np.ndarray:
    data = read_bytes(path)
    image = _decode_with_pillow(data, path)
    if image.mode in ("1", "P") or image.mode.startswith("I"):
        return np.asarray(image).astype(np.int32)
    if image.mode == "L":
        bits = data[24] if image.format == "PNG" else 8  # the bit depth is byte 24 of a PNG
        return np.asarray(image) // _PNG_GREY_SPREAD.get(bits, 1)
    raise ColorsError(
        f"{path}: holds colours (an image of mode {image.mode}), not class ids. "
        "Save the ids as a grey or palette PNG."
    )


def _read_sbd_ids(path: pathlib.Path) -> np.ndarray:
    """`GTcls.Segmentation` of a file in `benchmark_RELEASE/dataset/cls`."""
    import scipy.io  # here, as it takes a quarter of a second and other data sets do without

    data = read_bytes(path)
    try:
        variables = scipy.io.loadmat(io.BytesIO(data), variable_names=["GTcls"])
    except Exception as error:  # SciPy lets through what its parser stumbles on
        raise UserError(
            f"{path}: truncated, or no MATLAB file ({error}). Replace the file."
        ) from None
    ground_truth = variables.get("GTcls")
    fields = getattr(getattr(ground_truth, "dtype", None), "names", None) or ()
    if ground_truth is None or "Segmentation" not in fields:
        raise UserError(
            f"{path}: has no GTcls.Segmentation. SBD's class masks are in benchmark_RELEASE/"
            "dataset/cls; those in dataset/inst hold instances."
        )
    ids = ground_truth["Segmentation"].flat[0]
    if ids.ndim != 2 or not np.array_equal(ids, ids.astype(np.int32)):
        raise UserError(f"{path}: GTcls.Segmentation is not a matrix of class ids")
    return ids.astype(np.int32)


def to_label(
    ids: Integer[np.ndarray, "h w"], num_classes: int, ignore_label: int, path: pathlib.Path
) -> UInt8[np.ndarray, "h w"]:
    """Class ids with the ignore label mapped to `labels.IGNORE`.

    Args:
      ids: of a mask, in its file's own convention.
      num_classes: ids 0 to num_classes - 1 are classes.
      ignore_label: id of the pixels that do not count; it may be one of the classes.
      path: of the mask, for the error.

    Raises:
      UserError: an id is neither a class nor the ignore label.
    """
    ignored = ids == ignore_label
    foreign = ~ignored & ((ids < 0) | (ids >= num_classes))
    if foreign.any():
        values, counts = np.unique(ids[foreign], return_counts=True)
        told = ", ".join(
            f"id {v} ({n} pixels)" for v, n in zip(values[:5], counts[:5], strict=True)
        )
        more = f" and {len(values) - 5} other ids" if len(values) > 5 else ""
        raise UserError(
            f"{path}: {told}{more}: neither a class (0 to {num_classes - 1}) nor the ignore label "
            f"{ignore_label}. Mend the mask, or set config.data.ignore_label if these do not count."
        )
    return np.where(ignored, IGNORE, ids).astype(np.uint8)


def read_label(pair: Pair, num_classes: int, ignore_label: int) -> UInt8[np.ndarray, "h w"]:
    """The label of a pair, after all checks of its image and mask; see `to_label`.

    Raises:
      UserError: a file is missing or broken, sizes differ, or an id is no class.
    """
    for path in (pair.image, pair.mask):
        if not path.is_file():
            raise UserError(f"{path}: is missing, yet {pair.listed_in} names {pair.name}.")
    image_size = check_image(pair.image)
    label = to_label(read_ids(pair.mask), num_classes, ignore_label, pair.mask)
    check_sizes(pair.image, image_size, pair.mask, label.shape)
    return label


def check_sizes(
    image: pathlib.Path,
    image_size: tuple[int, ...],
    mask: pathlib.Path,
    mask_size: tuple[int, ...],
) -> None:
    """Raises a UserError if a mask has not its image's height and width."""
    if mask_size == image_size:
        return
    rotation = orientation(image)
    stored = f" as stored (to be shown turned: EXIF {rotation})" if rotation != 1 else ""
    raise UserError(
        f"{mask}: is {mask_size[1]} x {mask_size[0]} pixels (width x height), but its image "
        f"{image} is {image_size[1]} x {image_size[0]}{stored}. A mask must have its image's size."
    )


def orientation(path: pathlib.Path) -> int:
    """EXIF's orientation of an image file; 1, as stored, where it tells none."""
    try:
        with Image.open(path) as image:
            return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # a format that Pillow lacks, or that has no EXIF
        return 1


def check_all(
    check: Callable[[_Item], _Result], items: Sequence[_Item], headline: str
) -> list[_Result]:
    """`check(item)` for each item, on all cores, with a progress bar on stderr.

    Args:
      check: raises UserError where an item has a problem. Runs in threads.
      items: what to check.
      headline: first line of the error, and title of the bar.

    Returns:
      The results, in order.

    Raises:
      UserError: with the first `MAX_PROBLEMS_TOLD` problems of all items, and how many more.
    """

    def attempt(item: _Item) -> tuple[_Result | None, str]:
        try:
            return check(item), ""
        except UserError as error:
            return None, str(error)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        outcomes = list(watch(pool.map(attempt, items), headline, len(items)))
    raise_together(headline, [problem for _, problem in outcomes if problem])
    return [result for result, _ in outcomes]  # type: ignore[misc]  # none is left out


def watch(items: Iterable[_Item], title: str, total: int | None = None) -> Iterable[_Item]:
    """The items, with a progress bar on stderr."""
    return track(items, description=title, total=total, console=Console(stderr=True))


def raise_together(headline: str, problems: Iterable[str]) -> None:
    """Raises one UserError that lists the problems, if there are any."""
    problems = list(problems)
    if not problems:
        return
    told = [f"- {problem}" for problem in problems[:MAX_PROBLEMS_TOLD]]
    if len(problems) > MAX_PROBLEMS_TOLD:
        told.append(f"- and {len(problems) - MAX_PROBLEMS_TOLD} more")
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    raise UserError("\n".join([f"{headline}: {count}", *told]))


def read_bytes(path: pathlib.Path) -> bytes:
    """What a file holds; raises a UserError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
