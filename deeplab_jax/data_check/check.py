"""Checks every file of a user's images and masks, before hours of training on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import cv2

from deeplab_jax.config import DataConfig
from deeplab_jax.data.dataset import Pair
from deeplab_jax.data.datasets.folder_layout import detect_layout
from deeplab_jax.data.datasets.mask_format import read_mask_format
from deeplab_jax.data.io.masks import MaskFormat
from deeplab_jax.data_check import findings, proposal
from deeplab_jax.data_check.findings import Finding
from deeplab_jax.data_check.scan import ClassCount, Scan, count_classes, scan_pair
from deeplab_jax.utils.errors import UserError
from deeplab_jax.utils.progress import parallel_map


@dataclasses.dataclass(frozen=True)
class SplitSummary:
    """Numbers of a split."""

    images: int  # pairs
    # Width and height in pixels, ordered by their product.
    min_size: tuple[int, int] | None
    median_size: tuple[int, int] | None
    max_size: tuple[int, int] | None
    distinct_sizes: int
    pixels: int  # in all masks
    ignored_share: float  # of the pixels
    unknown_share: float  # of the pixels: neither of a class nor ignored


@dataclasses.dataclass(frozen=True)
class DataReport:
    """The result of a check."""

    root: str  # as it was given
    layout: str  # what defines the splits: "folders", "lists", "fraction" or "csv"
    notes: tuple[str, ...]  # what the reader found by itself
    masks_hold: str
    ignore_label: int
    splits: dict[str, SplitSummary]
    classes: tuple[ClassCount, ...]  # those of the proposal, if it is needed to read the masks
    unknown: dict[str, int]  # pixels by value that belongs to no class, the most frequent first
    proposal: str  # a file of classes, if the masks cannot be read well but show their classes
    findings: tuple[Finding, ...]  # errors, which make training impossible or useless, come first

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "error"]

    @property
    def warnings(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "warning"]

    def to_json(self) -> dict[str, Any]:
        counts = {"errors": len(self.errors), "warnings": len(self.warnings)}
        return counts | dataclasses.asdict(self)


def check(
    config: DataConfig, *, num_threads: int = 0
) -> tuple[DataReport, list[Scan], MaskFormat | None]:
    """Reads every pair below the root of a config, with a progress bar on stderr.

    `num_threads` of 0 is one per CPU.

    Returns:
      The report, the scans of all pairs, and the format of the masks; no scans and None if the
      classes are not known, nor can be proposed.

    Raises:
      UserError: the root has no known layout.
    """
    layout = detect_layout(config)
    pairs = [pair for split in layout.splits.values() for pair in split]
    notes, remarks = list(layout.notes), list(findings.check_layout(layout))
    found: list[Finding] = []
    scans: list[Scan] = []
    classes: tuple[ClassCount, ...] = ()
    unknown, fix, proposed = dict[str, int](), "", ""
    mask_format: MaskFormat | None
    try:
        mask_format = read_mask_format(config, pairs)
        notes += mask_format.notes
    except UserError as error:
        samples = proposal.survey_all([pair.mask for pair in pairs], num_threads)
        remarks += findings.check_samples(samples)
        proposed, mask_format = proposal.try_to_propose(config, pairs, samples)
        reason = getattr(error, "reason", "") if proposed else ""
        if pairs or not layout.problems:
            remarks.append(("classes", reason or str(error)))
    if mask_format is not None:
        scans = _scan_all(layout.splits, mask_format, config.folder.channels, num_threads)
        classes = count_classes(scans, mask_format)
        remarks += findings.check_scans(scans, classes)
        found += findings.check_mask_settings(scans, classes, mask_format)
        unknown, fix = findings.summarize_unknown(scans, mask_format)
    found += findings.collect(remarks, fix)
    if not proposed and any(finding.kind in findings.ABOUT_CLASSES for finding in found):
        samples = proposal.survey_all([pair.mask for pair in pairs], num_threads)
        proposed, _ = proposal.try_to_propose(config, pairs, samples)
    report = DataReport(
        root=config.root,
        layout=layout.kind,
        notes=tuple(notes),
        masks_hold=config.folder.masks_hold,
        ignore_label=config.ignore_label,
        splits={name: _summarize(scans, name, len(p)) for name, p in layout.splits.items()},
        classes=classes,
        unknown=unknown,
        proposal=proposed,
        findings=tuple(sorted(found, key=lambda finding: findings.LEVELS.index(finding.level))),
    )
    return report, scans, mask_format


def _scan_all(
    splits: Mapping[str, Sequence[Pair]],
    mask_format: MaskFormat,
    num_channels: int,
    num_threads: int,
) -> list[Scan]:
    tasks = [(split, pair) for split, pairs in splits.items() for pair in pairs]

    def scan(task: tuple[str, Pair]) -> Scan:
        return scan_pair(*task, mask_format, num_channels)

    verbosity = cv2.utils.logging.getLogLevel()
    # Otherwise OpenCV prints each broken file on stderr; the report has them too.
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        return list(parallel_map(scan, tasks, "Checking", num_threads=num_threads))
    finally:
        cv2.utils.logging.setLogLevel(verbosity)


def _summarize(scans: Sequence[Scan], split: str, num_pairs: int) -> SplitSummary:
    scans = [scan for scan in scans if scan.split == split]
    heights_widths = [scan.size for scan in scans if scan.size]
    sizes = [(w, h) for h, w in sorted(heights_widths, key=lambda size: (size[0] * size[1], size))]
    ignored = sum(scan.ignored for scan in scans)
    unknown = sum(sum(scan.unknown.values()) for scan in scans)
    pixels = sum(int(scan.counts.sum()) for scan in scans if scan.counts is not None)
    pixels += ignored + unknown
    least, median, largest = [sizes[i] for i in (0, len(sizes) // 2, -1)] if sizes else [None] * 3
    shares = (ignored / max(pixels, 1), unknown / max(pixels, 1))
    return SplitSummary(num_pairs, least, median, largest, len(set(sizes)), pixels, *shares)
