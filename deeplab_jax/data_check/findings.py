"""Finds what is wrong with a user's images and masks, from the scans of all pairs."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from deeplab_jax.data.datasets.folder_layout import FolderLayout
from deeplab_jax.data.io.mask_survey import MaskSample, describe
from deeplab_jax.data.io.masks import MaskFormat
from deeplab_jax.data.labels import IGNORE
from deeplab_jax.data_check import duplicates
from deeplab_jax.data_check.scan import ClassCount, Scan
from deeplab_jax.utils.errors import listed

LEVELS = ("error", "warning", "advice")
MAX_EXAMPLES = 5  # listed for each finding
_MAX_UNKNOWN = 20  # values of no class that are listed

# A class is rare if it has less than this fraction of the valid pixels or is in fewer images. A
# model then sees only a few crops of it in training.
RARE_FRACTION = 0.001
RARE_IMAGES = 5

_MASKS_HOLD = "config.data.folder.masks_hold"

# Message and fix of a finding, by the kind of its remarks.
_ERRORS = {
    "pairs": ("pairs are incomplete", ""),
    "classes": ("the classes are not known", ""),
    "unreadable": ("files cannot be read", "Replace them, or remove the pairs."),
    "sizes differ": (
        "masks have another size than their image",
        "Make each mask from its image as it is stored.",
    ),
    "colors": (
        "masks hold colours, not class ids",
        f"Set {_MASKS_HOLD}=colors and write the colours into "
        "classes.txt, as in `car 64 0 128`; or save the ids as grey or palette PNGs.",
    ),
    "shapes": ("shapes cannot be drawn", ""),
    "mixed": (
        "masks encode classes in another way than the other masks",
        "Save all masks in one encoding, or give these values to classes too.",
    ),
    "unknown": ("masks hold values that are neither a class nor ignored", ""),
    "duplicates across splits": (
        "several splits hold images with the same pixels, so that scores are too high",
        "Keep each in one split.",
    ),
}
_WARNINGS = {
    "other files": (
        "files are skipped: no suffix of an image, or beside the folders of splits",
        "",
    ),
    "empty splits": ("splits have no images; training needs both, or settings for others", ""),
    "jpeg mask": (
        "masks are JPEGs or in another lossy format, which changes values near edges",
        "Save masks as PNG.",
    ),
    "not drawn": (
        "shapes are not drawn: they have too few points, or no pixel in their image",
        "Delete or redraw them; many such may mean that the file is of images of another size.",
    ),
    "all ignored": (
        "masks hold only ignored pixels, and have no effect in training",
        "Check that config.data.ignore_label is right.",
    ),
    "exif": (
        "images have an EXIF orientation, which only prediction applies: masks have none",
        "Check with --sheet FILE.png that masks match; if not, rotate pixels and remove the tag.",
    ),
    "16 bits": (
        "images have more than 8 bits per channel: integers keep the upper 8 of 16 bits, floating-"
        "point numbers in 0..1 are scaled to 0..255",
        "If the values read are small (as of 12 bits in 16), scale all images to 8 bits yourself, "
        "those for prediction too.",
    ),
    "transparent": (
        "images have transparent pixels, which are put on white, in training and in prediction",
        "If another background is right, remove the alpha channel, in images for prediction too.",
    ),
    "duplicates": ("images have the same pixels as others of their split", ""),
    "near duplicates across splits": (
        f"images of two splits look nearly the same, as frames of a video do (a guess: at most "
        f"{duplicates.NEAR} of 64 bits of their thumbnails' hashes differ)",
        "If they are, split by scene, video or patient, not by image, or scores will be too high.",
    ),
    "absent classes": (
        "classes never occur: they cannot be learned without train, nor measured without val",
        "",
    ),
    "rare classes": (
        f"classes have less than {RARE_FRACTION:.1%} of the pixels of train, or are in fewer than "
        f"{RARE_IMAGES} of its images",
        "Add images of them, merge them, or weight them: --config.loss.class_weights=auto.",
    ),
}
_ADVICE = {
    "overlaps": ("regions of several classes overlap: each pixel is of the smallest region", ""),
}
_KINDS = {
    kind: (level, *texts)
    for level, kinds in zip(LEVELS, (_ERRORS, _WARNINGS, _ADVICE), strict=True)
    for kind, texts in kinds.items()
}

# Kinds of errors that another file of classes may mend.
ABOUT_CLASSES = ("classes", "colors", "mixed", "unknown")
MISREAD = (*ABOUT_CLASSES, "binary", "one class")  # kinds of errors of masks that are read wrong

Remark = tuple[str, str]  # a kind of finding, and one example of it


@dataclasses.dataclass(frozen=True)
class Finding:
    """A problem of a data set."""

    level: str  # one of `LEVELS`
    kind: str  # a few words that name the kind of problem
    message: str  # what is wrong
    mend: str  # how to fix it; empty if the message or the examples say it
    count: int  # number of files, pairs or classes that have the problem
    examples: tuple[str, ...] = ()  # the first of them


def collect(remarks: Iterable[Remark], unknown_fix: str) -> list[Finding]:
    """Groups remarks by kind, into findings in the order of the tables of kinds.

    `unknown_fix` says how to fix unknown values in masks.
    """
    examples: dict[str, list[str]] = defaultdict(list)
    for kind, example in remarks:
        examples[kind].append(example)
    findings = []
    for kind in sorted(examples, key=list(_KINDS).index):
        level, message, fix = _KINDS[kind]
        few = tuple(examples[kind][:MAX_EXAMPLES])
        mend = unknown_fix if kind == "unknown" else fix
        findings.append(Finding(level, kind, message, mend, len(examples[kind]), few))
    return findings


def check_layout(layout: FolderLayout) -> Iterator[Remark]:
    """Yields remarks on incomplete pairs, other files and empty splits."""
    yield from (("pairs", problem) for problem in layout.problems)
    yield from (("other files", str(path)) for path in layout.skipped)
    yield from (("empty splits", name) for name in ("train", "val") if not layout.splits.get(name))


def check_samples(samples: Sequence[MaskSample]) -> Iterator[Remark]:
    """Yields the masks that hold colours where most hold numbers, or the other way round."""
    colored = [sample for sample in samples if sample.kind == "colors"]
    # 0 and 255 may be the colours black and white.
    others = [sample for sample in samples if sample.numbers and not sample.greys <= {0, 255}]
    if colored and others:
        for sample in min(colored, others, key=len):
            what = "colours" if sample.kind == "colors" else "numbers"
            yield "mixed", f"{sample.path}: holds {what} ({describe([sample], 6)})"


def check_scans(scans: Sequence[Scan], classes: Sequence[ClassCount]) -> Iterator[Remark]:
    """Yields remarks on single pairs, duplicates, and absent and rare classes."""
    remarks = [remark for scan in scans for remark in scan.remarks]
    num_colors = sum(kind == "colors" for kind, _ in remarks)
    is_mixed = 0 < num_colors < sum(scan.counts is not None for scan in scans) + num_colors
    for kind, example in remarks:
        yield "mixed" if kind == "colors" and is_mixed else kind, example
    yield from _exact_duplicates(scans)
    yield from _near_duplicates(scans)
    num_train = sum(scan.split == "train" for scan in scans)
    for one in classes:
        missing = [split for split, images in one.images.items() if images == 0]
        fraction, images = one.share.get("train", 0), one.images.get("train", 0)
        if missing:
            yield "absent classes", f"{one.name}: not in {' or '.join(missing)}"
        if images and (fraction < RARE_FRACTION or images < RARE_IMAGES):
            yield (
                "rare classes",
                f"{one.name}: {fraction:.3%} of the pixels, in {images} of {num_train} images",
            )


def _exact_duplicates(scans: Sequence[Scan]) -> Iterator[Remark]:
    groups: dict[bytes, list[Scan]] = defaultdict(list)
    for scan in scans:
        if scan.digest is not None:
            groups[scan.digest].append(scan)
    for group in groups.values():
        names = " = ".join(f"{scan.split}/{scan.pair.name}" for scan in group[:4])
        if len({scan.split for scan in group}) > 1:
            yield "duplicates across splits", names
        elif len(group) > 1:
            yield "duplicates", names


def _near_duplicates(scans: Sequence[Scan]) -> Iterator[Remark]:
    scans = [scan for scan in scans if scan.gradients is not None]
    gradients = [scan.gradients for scan in scans]
    hashes = duplicates.hash_images(np.array(gradients, np.int16).reshape(-1, 64))
    splits = np.array([scan.split for scan in scans])
    for split, other in (("val", "train"), ("test", "train"), ("test", "val")):
        left, right = np.flatnonzero(splits == split), np.flatnonzero(splits == other)
        for i, j, distance in duplicates.near_pairs(hashes[left], hashes[right]):
            one, two = scans[left[i]], scans[right[j]]
            if one.digest != two.digest:
                yield (
                    "near duplicates across splits",
                    f"{split}/{one.pair.name} ~ {other}/{two.pair.name} ({distance} bits)",
                )


def check_mask_settings(
    scans: Sequence[Scan], classes: Sequence[ClassCount], mask_format: MaskFormat
) -> Iterator[Finding]:
    """Yields a finding if settings are wrong although they could be right for each single mask."""
    read = [scan for scan in scans if scan.counts is not None]
    values = set().union(*(scan.values for scan in read))
    present = [one.name for one in classes if any(one.images.values())]
    ids = mask_format.to_ids(np.array([sorted(values)], int))[0]
    ignored = [value for value, index in zip(sorted(values), ids, strict=True) if index == IGNORE]
    if mask_format.encoding == "ids" and 255 in ignored and values <= {0, 255}:
        yield Finding(
            "error",
            "binary",
            "masks hold only 0 and 255, and 255 is ignored: no pixel of a second class counts",
            "The file of classes says so. Give 255 to a class there."
            if (255, 255, IGNORE) in mask_format.values[1:]
            else f"Set {_MASKS_HOLD}=binary.",
            len(read),
        )
    elif len(present) == 1:
        others = listed([mask_format.describe_value(value) for value in ignored])
        yield Finding(
            "error",
            "one class",
            f"all pixels that count are {present[0]}: there is nothing to learn"
            + f"; {others} does not count" * bool(ignored),
            "Set config.data.ignore_label=255, or another value that does not count."
            if mask_format.ignore_label in set(ignored) - {255}
            else f"Check that {_MASKS_HOLD} and config.data.ignore_label are right.",
            len(read),
        )


def summarize_unknown(scans: Sequence[Scan], mask_format: MaskFormat) -> tuple[dict[str, int], str]:
    """Counts pixels by the most frequent values that belong to no class.

    Also suggests the setting that gives all of these values a meaning.
    """
    total: Counter[int] = Counter()
    for scan in scans:
        total.update(scan.unknown)
    pixels = {mask_format.describe_value(v): n for v, n in total.most_common(_MAX_UNKNOWN)}
    values = set().union(*(scan.values for scan in scans))
    return pixels, mask_format.suggest_fix(values, set(total)) if total else ""
