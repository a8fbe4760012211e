"""Statistics of a split: over all of its examples, or over a sample that is quick to read."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import cv2
import numpy as np
from jaxtyping import Int

from deeplab_jax.config import LossConfig
from deeplab_jax.data.dataset import Dataset, Example, read_example
from deeplab_jax.data.labels import IGNORE, class_counts
from deeplab_jax.utils.errors import UserError, listed
from deeplab_jax.utils.progress import parallel_map

_Result = TypeVar("_Result")
_SAMPLE_SIZE = 16  # examples, spread over the split

# Fraction of the pixels of one class from which the mean over pixels hardly depends on the others.
# The most frequent class has 33 % in CamVid, 70 to 75 % in VOC.
_DOMINANT = 0.95
MEND_IMBALANCE = (
    "Weight the classes, --config.loss.class_weights=auto, or train with another loss, "
    "--config.loss.name=dice or --config.loss.name=focal."
)


def map_examples(
    function: Callable[[Example], _Result], dataset: Dataset, title: str, *, quiet: bool = False
) -> Iterator[_Result]:
    """Yields `function(example)` for each example in order; see `parallel_map`.

    Raises:
      UserError: an example is damaged.
    """
    return parallel_map(
        lambda index: function(read_example(dataset, index)),
        range(len(dataset.source)),
        title,
        quiet=quiet,
    )


def class_pixels(
    dataset: Dataset, title: str, *, quiet: bool = False
) -> Iterator[Int[np.ndarray, " classes"]]:
    """Yields the number of pixels of each class in each image; see `map_examples`."""
    num_classes = dataset.labels.num_classes
    return map_examples(
        lambda example: class_counts(example["label"], num_classes), dataset, title, quiet=quiet
    )


@dataclasses.dataclass(frozen=True)
class SampleSummary:
    """What a sample of a split shows about it.

    Attributes:
      class_names: names of the classes.
      num_examples: size of the split, not of the sample.
      label_digest: digest of the names, sizes and labels. PNG decoders agree on it.
      image_digest: digest of the decoded images. It depends on the decoder of JPEG.
      pixels: number of pixels of each class.
      empty_ratio: fraction of the crops in which all pixels are ignored; see `summarize_sample`.
    """

    class_names: tuple[str, ...]
    num_examples: int
    label_digest: str
    image_digest: str
    pixels: Int[np.ndarray, " classes"]
    empty_ratio: float


def summarize_sample(dataset: Dataset, crop_shape: tuple[int, int] | None) -> SampleSummary:
    """Reads up to 16 examples, spread over a split, and summarizes them.

    Args:
      dataset: the split.
      crop_shape: height and width of the crops that `empty_ratio` counts: all crops that lie in an
        unscaled image, or the whole image along an axis along which it is smaller. None: each
        image is one crop.

    Raises:
      UserError: an example is damaged.
    """
    num_examples = len(dataset.source)
    num_read = min(num_examples, _SAMPLE_SIZE)
    indices = [int(index) for index in np.linspace(0, num_examples - 1, num_read).round()]
    digests = hashlib.sha256(), hashlib.sha256()
    pixels = np.zeros(dataset.labels.num_classes, np.int64)
    empty_ratios = []

    def summarize(index: int) -> tuple[bytes, bytes, np.ndarray, float]:
        example = read_example(dataset, index)
        image, label = example["image"], example["label"]
        about = f"{example['name']} {image.dtype} {image.shape}".encode(errors="surrogateescape")
        return (
            hashlib.sha256(about + np.ascontiguousarray(label).tobytes()).digest(),
            hashlib.sha256(np.ascontiguousarray(image).tobytes()).digest(),
            class_counts(label, len(pixels)),
            _empty_crop_ratio(label, crop_shape),
        )

    for label_digest, image_digest, counts, ratio in parallel_map(
        summarize, indices, "", quiet=True
    ):
        digests[0].update(label_digest)
        digests[1].update(image_digest)
        pixels += counts
        empty_ratios.append(ratio)
    return SampleSummary(
        class_names=dataset.labels.names,
        num_examples=num_examples,
        label_digest=digests[0].hexdigest()[:16],
        image_digest=digests[1].hexdigest()[:16],
        pixels=pixels,
        empty_ratio=float(np.mean(empty_ratios)) if empty_ratios else 0.0,
    )


def _empty_crop_ratio(label: np.ndarray, crop_shape: tuple[int, int] | None) -> float:
    """The fraction of the crops' positions at which a crop has no valid pixel."""
    height, width = label.shape if crop_shape is None else np.minimum(crop_shape, label.shape)
    sums = cv2.integral((label != IGNORE).astype(np.uint8))
    counts = sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width]
    return float(np.mean(counts + sums[:-height, :-width] == 0))


def check_valid_pixels(dataset: Dataset, summary: SampleSummary, split: str) -> list[str]:
    """Checks that a split has pixels to learn from and to score.

    Returns:
      Warnings: about classes without pixels, if the sample is the whole split, and if more than
      half of the crops are empty.

    Raises:
      UserError: all pixels of all examples are ignored.
    """
    labels, num_examples = dataset.labels, summary.num_examples
    if not num_examples:
        return []  # `pipeline` raises an error
    if not summary.pixels.any() and not any(map(np.any, class_pixels(dataset, split, quiet=True))):
        raise UserError(
            f"config.data: every pixel of the {num_examples} images in {split!r} has the ignore "
            "label, so there is nothing to learn from or to score. Look at the masks with "
            "deeplab-jax data check, and at config.data.ignore_label"
        )
    warnings = []
    absent = [name for name, count in zip(labels.names, summary.pixels, strict=True) if not count]
    if absent and num_examples <= _SAMPLE_SIZE:
        warnings.append(f"no image in {split!r} has a pixel of {', '.join(absent)}")
    if summary.empty_ratio > 0.5:
        warnings.append(
            f"every pixel is ignored in about {int(100 * summary.empty_ratio)}% of the crops of "
            f"{split!r}"
        )
    return warnings


def describe_imbalance(names: Sequence[str], pixels: Sequence[int], loss: LossConfig) -> str:
    """Describes a class that has nearly all pixels, and the classes that the loss then neglects.

    Args:
      names: of the classes.
      pixels: number of pixels of each class.
      loss: the loss of the training.

    Returns:
      A sentence; empty if no class has 95 % of the pixels, or the loss is made for that.
    """
    shares = np.array(pixels) / max(sum(pixels), 1)
    first, *others = np.argsort(-shares, kind="stable")
    is_plain = loss.name == "cross_entropy" and loss.class_weights is None
    if not is_plain or loss.hard_pixel_fraction < 1 or not _DOMINANT <= shares[first] < 1:
        return ""
    rest = listed([f"{names[index]} {shares[index]:.2%}" for index in others if shares[index]])
    return (
        f"{names[first]} has {shares[first]:.2%} of the pixels ({rest}): a model that finds "
        "nothing else is right on all of these, and training with equal weights may end there"
    )
