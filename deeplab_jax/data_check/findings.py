"""What is wrong with a user's images and masks, judged from the scans of all pairs."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from deeplab_jax.data.io.masks import MaskFormat
from deeplab_jax.data_check import duplicates
from deeplab_jax.data_check.scan import ClassCount, Scan

MAX_EXAMPLES = 5  # told of each finding

# A class is rare if fewer of the pixels that count, or fewer images, show it: all that a model sees
# of it in a training are then a few crops.
RARE_SHARE = 0.001
RARE_IMAGES = 5

_HOLDS = "config.data.folder.masks_hold"

# What is wrong with a pair by the kind of its remark: level, what is wrong, what to do.
_REMARKS = {
    "unreadable": ("error", "files cannot be read", "Replace them, or take the pairs away."),
    "sizes differ": (
        "error",
        "masks have another size than their image",
        "Make each mask anew from its image as it is stored.",
    ),
    "colors": (
        "error",
        "masks hold colours, not class ids",
        f"Set {_HOLDS}=colors (here: --masks-hold colors) and write the colours into classes.txt, "
        "as in `car 64 0 128`; or save the ids as grey or palette PNGs.",
    ),
    "unknown": ("error", "masks hold what is neither a class nor ignored", ""),
    "jpeg mask": (
        "warning",
        "masks are JPEGs, which change values near edges",
        "Save masks as PNG.",
    ),
    "all ignored": (
        "warning",
        "masks hold ignored pixels alone, and teach nothing",
        "See whether config.data.ignore_label is right.",
    ),
    "exif": (
        "warning",
        "images are to be shown turned (EXIF), but are read as they are stored",
        "See on the contact sheet (--sheet FILE.png) whether their masks lie on them; if not, turn "
        "the pixels and drop the tag.",
    ),
    "16 bits": (
        "warning",
        "images have 16 bits a channel, of which the upper 8 are taken",
        "If those are mostly 0, scale the images to 8 bits yourself.",
    ),
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something to tell.

    Attributes:
      level: "error" or "warning".
      kind: a few words, the same whenever the same is wrong.
      message: what is wrong.
      mend: what to do; empty where the message or the examples say it.
      count: how many files, pairs or classes it is about.
      examples: the first of them.
    """

    level: str
    kind: str
    message: str
    mend: str
    count: int
    examples: tuple[str, ...] = ()


def finding(
    level: str, kind: str, message: str, examples: Sequence[str], mend: str = ""
) -> Finding:
    return Finding(level, kind, message, mend, len(examples), tuple(examples[:MAX_EXAMPLES]))


def judge(
    scans: Sequence[Scan], classes: Sequence[ClassCount], mask_format: MaskFormat
) -> list[Finding]:
    """All findings on the pairs, errors first."""
    found = [
        *_of_remarks(scans, mask_format),
        *_confusions(scans, classes, mask_format),
        *_exact_duplicates(scans),
        *_near_duplicates(scans),
        *_rare_classes(scans, classes),
    ]
    return sorted(found, key=lambda one: one.level)


def _of_remarks(scans: Sequence[Scan], mask_format: MaskFormat) -> Iterator[Finding]:
    told: dict[str, list[str]] = defaultdict(list)
    for scan in scans:
        for kind, text in scan.remarks:
            told[kind].append(text)
    for kind, (level, message, mend) in _REMARKS.items():
        if kind == "unknown" and kind in told:
            mend = _mend_unknown(scans, mask_format)
        if kind in told:
            yield finding(level, kind, message, told[kind], mend)


def _mend_unknown(scans: Sequence[Scan], mask_format: MaskFormat) -> str:
    """The setting that gives all unknown values a meaning, if there is one."""
    unknown = {value for scan in scans for value in scan.unknown}
    values = set().union(*(scan.values for scan in scans))
    num_classes = mask_format.labels.num_classes
    if mask_format.holds == "ids" and unknown == {num_classes} and 0 not in values:
        return (
            f"Ids are 1 to {num_classes}: write a first line for id 0, as `background`, into "
            "classes.txt, or subtract 1 from the ids."
        )
    return mask_format.hint(values, unknown)


def _confusions(
    scans: Sequence[Scan], classes: Sequence[ClassCount], mask_format: MaskFormat
) -> Iterator[Finding]:
    """Settings that are wrong though each mask alone could be right."""
    read = [scan for scan in scans if scan.counts is not None]
    values = set().union(*(scan.values for scan in read))
    if mask_format.holds == "ids" and 255 in values <= {0, 255} and mask_format.ignore_label == 255:
        yield Finding(
            "error",
            "binary",
            "masks hold 0 and 255 alone, and 255 is ignored: no pixel of a second class counts",
            f"Set {_HOLDS}=binary (here: --masks-hold binary).",
            len(read),
        )
        return
    present = [one.name for one in classes if any(one.images.values())]
    if len(present) == 1 < len(classes):
        yield Finding(
            "error",
            "one class",
            f"all pixels that count are {present[0]}: there is nothing to learn",
            f"See whether {_HOLDS} and config.data.ignore_label are right.",
            len(read),
        )


def _exact_duplicates(scans: Sequence[Scan]) -> Iterator[Finding]:
    groups: dict[bytes, list[Scan]] = defaultdict(list)
    for scan in scans:
        if scan.digest is not None:
            groups[scan.digest].append(scan)
    across, within = [], []
    for group in groups.values():
        text = " = ".join(f"{scan.split}/{scan.pair.name}" for scan in group[:4])
        if len({scan.split for scan in group}) > 1:
            across.append(text)
        elif len(group) > 1:
            within.append(text)
    if across:
        yield finding(
            "error",
            "duplicates across splits",
            "images are the same, pixel by pixel, in several splits: what a model is trained on "
            "cannot measure it",
            across,
            "Keep each in one split.",
        )
    if within:
        yield finding(
            "warning", "duplicates", "images are the same, pixel by pixel, in one split", within
        )


def _near_duplicates(scans: Sequence[Scan]) -> Iterator[Finding]:
    hashed: dict[str, list[Scan]] = defaultdict(list)
    for scan in scans:
        if scan.hash is not None:
            hashed[scan.split].append(scan)
    examples = []
    for ours, theirs in (("val", "train"), ("test", "train"), ("test", "val")):
        left, right = hashed[ours], hashed[theirs]
        for i, j, distance in duplicates.near_pairs(_hashes(left), _hashes(right)):
            if left[i].digest != right[j].digest:
                examples.append(
                    f"{ours}/{left[i].pair.name} ~ {theirs}/{right[j].pair.name} ({distance} bits)"
                )
    if examples:
        yield finding(
            "warning",
            "near duplicates across splits",
            f"images are nearly the same in two splits (dHash, at most {duplicates.NEAR} of 64 "
            "bits differ), as frames of a video are",
            examples,
            "Divide by scene or video rather than by image, or scores will be too high.",
        )


def _hashes(scans: Sequence[Scan]) -> np.ndarray:
    return np.array([scan.hash for scan in scans], np.uint64)


def _rare_classes(scans: Sequence[Scan], classes: Sequence[ClassCount]) -> Iterator[Finding]:
    num_train = sum(scan.split == "train" for scan in scans)
    absent, rare = [], []
    for one in classes:
        missing = [split for split, images in one.images.items() if images == 0]
        share, images = one.share.get("train", 0), one.images.get("train", 0)
        if missing:
            absent.append(f"{one.name}: not in {' or '.join(missing)}")
        if images and (share < RARE_SHARE or images < RARE_IMAGES):
            rare.append(f"{one.name}: {share:.3%} of the pixels, in {images} of {num_train} images")
    if absent:
        yield finding(
            "warning",
            "absent classes",
            "classes never occur: they cannot be learnt without train, nor measured without val",
            absent,
        )
    if rare:
        yield finding(
            "warning",
            "rare classes",
            f"classes have less than {RARE_SHARE:.1%} of the pixels of train, or are in fewer than "
            f"{RARE_IMAGES} of its images",
            rare,
            "Add images that show them, merge them with others, or weigh them: "
            "--config.loss.class_weights=auto.",
        )


def unknown_pixels(scans: Sequence[Scan], mask_format: MaskFormat, limit: int) -> dict[str, int]:
    """Pixels by the value that is of no class, the most first, up to a number of values."""
    total: Counter[int] = Counter()
    for scan in scans:
        total.update(scan.unknown)
    return {mask_format.spell(value): count for value, count in total.most_common(limit)}
