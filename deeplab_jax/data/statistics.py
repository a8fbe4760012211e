"""Statistics of a split: over all of its examples, or over a sample that is quick to read."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import Int

from deeplab_jax.config import LossConfig
from deeplab_jax.data.dataset import Dataset, Example, read_example
from deeplab_jax.data.labels import class_counts
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
    """What a sample of a split shows about it."""

    class_names: tuple[str, ...]
    num_examples: int  # of the split, not of the sample
    label_digest: str  # of the names, sizes and labels. PNG decoders agree on it
    image_digest: str  # of the decoded images. It depends on the decoder of JPEG
    pixels: Int[np.ndarray, " classes"]  # number of each class
    ignored_share: float  # fraction of the pixels


def summarize_sample(dataset: Dataset) -> SampleSummary:
    """Reads up to 16 examples, spread over a split, and summarizes them.

    Raises:
      UserError: an example is damaged.
    """
    num_examples, num_classes = len(dataset.source), dataset.labels.num_classes
    num_read = min(num_examples, _SAMPLE_SIZE)
    indices = [int(index) for index in np.linspace(0, num_examples - 1, num_read).round()]

    def summarize(index: int) -> tuple[bytes, bytes, np.ndarray, int]:
        example = read_example(dataset, index)
        image, label = example["image"], example["label"]
        about = f"{example['name']} {image.dtype} {image.shape}".encode(errors="surrogateescape")
        return (
            hashlib.sha256(about + label.tobytes()).digest(),
            hashlib.sha256(image.tobytes()).digest(),
            class_counts(label, num_classes),
            label.size,
        )

    read = parallel_map(summarize, indices, "", quiet=True)
    about_labels, about_images, pixels, sizes = list(zip(*read, strict=True)) or [()] * 4
    counts = sum(pixels, np.zeros(num_classes, np.int64))
    return SampleSummary(
        class_names=dataset.labels.names,
        num_examples=num_examples,
        label_digest=hashlib.sha256(b"".join(about_labels)).hexdigest()[:16],
        image_digest=hashlib.sha256(b"".join(about_images)).hexdigest()[:16],
        pixels=counts,
        ignored_share=1 - counts.sum() / max(sum(sizes), 1),
    )


def check_valid_pixels(dataset: Dataset, summary: SampleSummary, split: str) -> list[str]:
    """Warns of classes without pixels in a split, and if more than half of them are ignored.

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
    if summary.ignored_share > 0.5:
        share = int(100 * summary.ignored_share)
        warnings.append(f"about {share}% of the pixels in {split!r} are ignored")
    return warnings


def describe_imbalance(names: Sequence[str], pixels: Sequence[int], loss: LossConfig) -> str:
    """Describes in a sentence a class that has nearly all pixels, and those that are neglected.

    It is empty if no class has 95 % of the `pixels`, or if the loss is made for that.
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
