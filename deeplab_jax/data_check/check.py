"""A look at every file of a user's images and masks, before hours of training on them.

`check` reads all pairs and gives a `Report`: what there is, and findings: errors, which would stop
a training or make it worthless, and warnings.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import cv2

from deeplab_jax.config import DataConfig
from deeplab_jax.data.datasets import folder, layout
from deeplab_jax.data.io import reading
from deeplab_jax.data.io.masks import MaskFormat
from deeplab_jax.data.io.reading import Pair
from deeplab_jax.data_check.findings import Finding, finding, judge, unknown_pixels
from deeplab_jax.data_check.scan import ClassCount, Scan, count_classes, scan
from deeplab_jax.utils.errors import UserError

_MAX_UNKNOWN = 20  # values of no class that are told, of however many


@dataclasses.dataclass(frozen=True)
class Split:
    """What is in a split.

    Attributes:
      images: number of pairs.
      min_size, median_size, max_size: width and height in pixels, ordered by their product.
      distinct_sizes: number of them.
      pixels: of all masks.
      ignored_share: of them, that do not count.
      unknown_share: of them, that are of no class.
    """

    images: int
    min_size: tuple[int, int] | None
    median_size: tuple[int, int] | None
    max_size: tuple[int, int] | None
    distinct_sizes: int
    pixels: int
    ignored_share: float
    unknown_share: float


@dataclasses.dataclass(frozen=True)
class Report:
    """What a check found.

    Attributes:
      root: as it was given.
      layout: how splits are told apart: "folders", "lists", "fraction" or "csv".
      masks_hold, ignore_label: the settings.
      splits: by name.
      classes: in the order of ids.
      unknown: pixels by what is of no class, the most first.
      findings: errors, then warnings.
    """

    root: str
    layout: str
    masks_hold: str
    ignore_label: int
    splits: dict[str, Split]
    classes: tuple[ClassCount, ...]
    unknown: dict[str, int]
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> list[Finding]:
        return [one for one in self.findings if one.level == "error"]

    @property
    def warnings(self) -> list[Finding]:
        return [one for one in self.findings if one.level == "warning"]

    def to_json(self) -> dict[str, Any]:
        counts = {"errors": len(self.errors), "warnings": len(self.warnings)}
        return counts | dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Checked:
    """A report, and what it was made of: no scans where the classes are not known."""

    report: Report
    scans: list[Scan]
    mask_format: MaskFormat | None


def check(config: DataConfig, *, workers: int = 0) -> Checked:
    """Reads every pair of a root, with a progress bar on stderr.

    Args:
      config: its `root`, `folder` and `ignore_label` decide.
      workers: threads; 0: as many as there are CPUs.

    Raises:
      UserError: the root is of no known layout.
    """
    found = layout.find(config)
    findings = _of_layout(found)
    scans: list[Scan] = []
    classes: tuple[ClassCount, ...] = ()
    mask_format = None
    try:
        pairs = [pair for split in found.splits.values() for pair in split]
        mask_format = folder.read_format(config, pairs)
    except UserError as error:
        findings.append(finding("error", "classes", "the classes are not known", [str(error)]))
    else:
        scans = scan_all(found.splits, mask_format, config.folder.channels, workers)
        classes = count_classes(scans, mask_format)
        findings += judge(scans, classes, mask_format)
    findings.sort(key=lambda one: one.level)
    report = Report(
        root=config.root,
        layout=found.kind,
        masks_hold=config.folder.masks_hold,
        ignore_label=config.ignore_label,
        splits={name: _count_split(scans, name, len(p)) for name, p in found.splits.items()},
        classes=classes,
        unknown={} if mask_format is None else unknown_pixels(scans, mask_format, _MAX_UNKNOWN),
        findings=tuple(findings),
    )
    return Checked(report, scans, mask_format)


def _of_layout(found: layout.Layout) -> list[Finding]:
    findings = []
    if found.problems:
        findings.append(finding("error", "pairs", "pairs are incomplete", found.problems))
    if found.skipped:
        examples = [str(path) for path in found.skipped]
        message = "files have no suffix of an image, and are passed over"
        findings.append(finding("warning", "other files", message, examples))
    empty = [name for name in ("train", "val") if not found.splits.get(name)]
    if empty:
        message = "splits have no images; training needs both, or settings for others"
        findings.append(finding("warning", "empty splits", message, empty))
    return findings


def scan_all(
    splits: Mapping[str, Sequence[Pair]], mask_format: MaskFormat, num_channels: int, workers: int
) -> list[Scan]:
    """Every pair of every split, read in threads."""
    tasks = [(split, pair) for split, pairs in splits.items() for pair in pairs]
    verbosity = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(
        cv2.utils.logging.LOG_LEVEL_SILENT
    )  # it tells of each broken file on stderr, as the report does
    try:
        with concurrent.futures.ThreadPoolExecutor(workers or os.cpu_count()) as pool:
            results = pool.map(
                lambda task: scan(task[0], task[1], mask_format, num_channels), tasks
            )
            return list(reading.watch(results, "Checking", len(tasks)))
    finally:
        cv2.utils.logging.setLogLevel(verbosity)


def _count_split(scans: Sequence[Scan], split: str, num_pairs: int) -> Split:
    mine = [one for one in scans if one.split == split]
    sizes = sorted(
        (one.size for one in mine if one.size), key=lambda size: (size[0] * size[1], size)
    )
    width_first = [(width, height) for height, width in sizes]
    ignored = sum(one.ignored for one in mine)
    unknown = sum(sum(one.unknown.values()) for one in mine)
    pixels = (
        ignored + unknown + sum(int(one.counts.sum()) for one in mine if one.counts is not None)
    )
    return Split(
        images=num_pairs,
        min_size=width_first[0] if sizes else None,
        median_size=width_first[len(sizes) // 2] if sizes else None,
        max_size=width_first[-1] if sizes else None,
        distinct_sizes=len(set(sizes)),
        pixels=pixels,
        ignored_share=ignored / max(pixels, 1),
        unknown_share=unknown / max(pixels, 1),
    )
