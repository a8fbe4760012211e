"""Adds up the results of the batches of an evaluation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from deeplab_jax.data import pipeline
from deeplab_jax.data.dataset import Dataset
from deeplab_jax.data.labels import LabelSet, default_positive, is_background
from deeplab_jax.distributed import multihost
from deeplab_jax.evaluation.binary import Curves, ScoreCounts
from deeplab_jax.evaluation.confusion import (
    ClassScores,
    Scores,
    boundary_iou,
    class_scores,
    count_boundary,
    nan_mean,
    scores,
)
from deeplab_jax.inference.positive import PositiveClass


class Prediction(NamedTuple):
    """An image of a split with its label and prediction, at the size at which it is scored."""

    name: str
    image: np.ndarray  # uint8 [h, w, c]
    label: np.ndarray  # uint8 [h, w]
    ids: np.ndarray  # uint8 [h, w]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
      matrix: int64 `[classes, classes]`, pixels by true and predicted class, over all images.
      num_images: number of images.
      labels: names and colours of the classes.
      predictions: of `config.eval.num_pictures` images of each host, which show different classes.
      matrices: int32 `[images, classes, classes]`, of each image, if requested.
      boundary_counts: int64 `[classes, 2]`, see `count_boundary`, if requested.
      positive, curves: the positive class, if any, and its curves.
    """

    matrix: np.ndarray
    num_images: int
    labels: LabelSet
    predictions: list[Prediction]
    matrices: np.ndarray | None
    boundary_counts: np.ndarray | None
    positive: PositiveClass | None = None
    curves: Curves | None = None

    @functools.cached_property
    def scores(self) -> Scores:
        has_background = is_background(self.labels.names[0])
        return scores(self.matrix, background=0 if has_background else None)

    @property
    def positive_scores(self) -> ClassScores | None:
        """Scores of the positive class, by default that of two classes; None without one."""
        index = self.positive.class_id if self.positive else default_positive(self.labels)
        return None if index is None else class_scores(self.matrix, index)

    @property
    def per_class_boundary_iou(self) -> np.ndarray | None:
        return None if self.boundary_counts is None else boundary_iou(self.boundary_counts)

    @property
    def boundary_miou(self) -> float | None:
        values = self.per_class_boundary_iou
        return None if values is None else nan_mean(values)


# The result of a batch, perhaps still being computed: int32 `[b]`, the index of each example of all
# hosts, -1 for rows without one; int32 `[b, classes, classes]`, its confusion matrix. A function
# fetches the ids, uint8 `[rows, h, w]`, of this host's rows from the devices; and, with
# a positive class, its probabilities, float32 `[rows, h, w]`.
BatchResult = tuple[
    np.ndarray | jax.Array, np.ndarray | jax.Array, Callable[[], Sequence[np.ndarray]]
]


@dataclasses.dataclass
class Tally:
    """Adds up the results of batches and checks that each image is counted exactly once.

    `rows` are the rows of each batch on this host; `num_pictures` predictions are kept as pictures;
    `positive` is the class that has curves; the others are arguments of `Evaluator.evaluate`.
    """

    dataset: Dataset
    num_classes: int
    rows: Sequence[int]
    num_pictures: int
    per_image: bool
    boundary: bool
    positive: PositiveClass | None
    each: Callable[[Prediction], None] | None

    def __post_init__(self) -> None:
        num_images, classes = len(self.dataset.source), self.num_classes
        # By the images' indices; the classes are those in their labels, bool `[classes]`.
        self._pictures: dict[int, Prediction] = {}
        self._classes: dict[int, np.ndarray] = {}
        self._matrix = np.zeros((classes, classes), np.int64)
        self._times_counted = np.zeros(num_images, np.int64)
        self._matrices = self._boundary = self._scores = None
        if self.per_image:
            self._matrices = np.zeros((num_images, classes, classes), np.int32)
        if self.boundary:
            self._boundary = np.zeros((num_images, classes, 2), np.int32)
        if self.positive is not None:
            self._scores = ScoreCounts()
            # Hosts along the height of images have the same rows: the first one counts them.
            hosts = multihost.allgather(list(self.rows))[: jax.process_index()]
            self._is_counted = [all(row not in host for host in hosts) for row in self.rows]

    def add(self, batch: pipeline.EvalBatch, result: BatchResult) -> None:
        """Adds a batch; waits until its result is computed."""
        indices, matrices = jax.device_get(result[:2])
        indices, matrices = indices[indices >= 0], matrices[indices >= 0]
        np.add.at(self._times_counted, indices, 1)
        self._matrix += matrices.sum(axis=0, dtype=np.int64)
        if self._matrices is not None:
            self._matrices[indices] = matrices
        classes = dict(zip(indices.tolist(), list(matrices.sum(axis=2) > 0), strict=True))
        fetch = functools.cache(result[2])
        # The rows of this process that hold an example, without their padding.
        for row in np.flatnonzero(batch["index"] >= 0):
            index, (height, width) = int(batch["index"][row]), batch["size"][row]
            is_picture = self._choose_picture(index, classes[index])
            inside = (row, slice(height), slice(width))
            image, label = batch["image"][inside], batch["label"][inside]
            if self.positive and self._scores and self._is_counted[row]:
                valid = label < self.num_classes
                is_positive = label[valid] == self.positive.class_id
                self._scores.add(fetch()[1][inside][valid], is_positive)
            if self._boundary is not None:
                ids = fetch()[0][inside]
                self._boundary[index] = count_boundary(label, ids, self.num_classes)
            if is_picture or self.each:
                name, ids = batch["name"][row], fetch()[0][inside]
                if is_picture:  # copies, so that the batch does not stay in memory
                    self._pictures[index] = Prediction(name, image.copy(), label.copy(), ids.copy())
                if self.each:
                    self.each(Prediction(name, image, label, ids))

    def _choose_picture(self, index: int, classes: np.ndarray) -> bool:
        """Decides whether an image becomes a picture, possibly in place of an earlier one.

        A set of pictures is worth `num_classes` for each class that it shows, and 1/n for the n-th
        picture of a class. The first images are pictures; a later one replaces the picture that
        adds the least, if the set is then worth 1 / `num_pictures` more: few images do.
        """
        if len(self._classes) >= self.num_pictures:
            if not self._classes:
                return False
            shown = np.sum(list(self._classes.values()), axis=0)
            worth = np.array([0, len(classes), *(1 / np.arange(2, self.num_pictures + 2))])
            gains = {
                other: worth[shown + 1] @ (classes & ~old) - worth[shown] @ (old & ~classes)
                for other, old in self._classes.items()
            }
            worst = max(gains, key=gains.__getitem__)
            if gains[worst] <= 1 / self.num_pictures:
                return False
            del self._classes[worst], self._pictures[worst]
        self._classes[index] = classes
        return True

    def evaluation(self) -> Evaluation:
        if np.any(self._times_counted != 1):
            raise RuntimeError(
                f"images {np.flatnonzero(self._times_counted != 1).tolist()} of "
                f"{len(self._times_counted)} were not counted exactly once"
            )
        boundary_counts = None
        if self._boundary is not None:
            # Each host counted its own rows, and left zeros in the others.
            boundary = multihost_utils.process_allgather(self._boundary)
            boundary_counts = boundary.max(axis=0).sum(axis=0, dtype=np.int64)
        return Evaluation(
            matrix=self._matrix,
            num_images=len(self._times_counted),
            labels=self.dataset.labels,
            predictions=[self._pictures[index] for index in sorted(self._pictures)],
            matrices=self._matrices,
            boundary_counts=boundary_counts,
            positive=self.positive,
            curves=self._scores.curves() if self._scores else None,
        )
