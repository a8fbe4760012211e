"""Evaluates a model on a split of a data set."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array

from deeplab_jax.config import Config
from deeplab_jax.data import pipeline
from deeplab_jax.data.dataset import Dataset
from deeplab_jax.data.labels import LabelSet
from deeplab_jax.distributed import mesh as mesh_lib
from deeplab_jax.distributed import multihost
from deeplab_jax.evaluation.boundary import boundary_iou, count_boundary
from deeplab_jax.evaluation.confusion import (
    Scores,
    confusion_matrices,
    confusion_matrix,
    nan_mean,
    scores,
)
from deeplab_jax.evaluation.protocols import PROTOCOLS
from deeplab_jax.inference.compilation import jit_inference
from deeplab_jax.inference.predictor import Predictor, TestTimeAugmentation, predict_ids
from deeplab_jax.models.functional import FunctionalModel, Variables, normalize


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
      predictions: of the first images, `config.eval.num_pictures` on each host.
      matrices: int32 `[images, classes, classes]`, the matrix of each image, in order; None unless
        requested.
      boundary_counts: int64 `[classes, 2]`, pixels in the intersection and union of boundaries,
        see `count_boundary`; None unless requested.
    """

    matrix: np.ndarray
    num_images: int
    labels: LabelSet
    predictions: list[Prediction]
    matrices: np.ndarray | None
    boundary_counts: np.ndarray | None

    @functools.cached_property
    def scores(self) -> Scores:
        has_background = self.labels.names[0] == "background"
        return scores(self.matrix, background=0 if has_background else None)

    @property
    def per_class_boundary_iou(self) -> np.ndarray | None:
        return None if self.boundary_counts is None else boundary_iou(self.boundary_counts)

    @property
    def boundary_miou(self) -> float | None:
        values = self.per_class_boundary_iou
        return None if values is None else nan_mean(values)


class _BatchResult(NamedTuple):
    """The result of one batch.

    Attributes:
      indices: int32 `[b]`, of the examples; -1 for rows without one. Of all hosts; with windows, of
        this host only.
      matrices: int32 `[b, classes, classes]`, of the same rows.
      fetch_ids: returns uint8 `[rows, h, w]` of this host's rows, which stay on the devices until
        it is called.
    """

    indices: np.ndarray
    matrices: np.ndarray
    fetch_ids: Callable[[], np.ndarray]


class Evaluator:
    """Evaluates variables of one model on one split, under the protocol that the config names.

    Each valid pixel of each image is scored once, at the size that the protocol gives to labels.
    One program is compiled for each shape of batches.
    """

    def __init__(self, model: FunctionalModel, dataset: Dataset, config: Config, mesh: Mesh):
        stride = config.eval.output_stride
        self._model = model if stride is None else model.at_output_stride(stride)
        self._num_classes = model.architecture.num_classes
        self._dataset = dataset
        self._config = config
        self._protocol = PROTOCOLS[config.eval.protocol]
        self._mesh = mesh
        # Padding rows are not counted, so the batch may grow to a multiple of the devices.
        devices = mesh.shape[mesh_lib.DATA]
        self._batch_size = -(-config.eval.batch_size // devices) * devices
        if config.eval.window:  # each host takes one image
            self._batch_size = jax.process_count()
        self._num_compilations = 0
        replicated = mesh_lib.replicated(mesh)
        self._fuse = jax.jit(self._model.fuse)
        self._step = jit_inference(
            self._evaluate_batch,
            self._model.fused,
            static_argnames="height",
            out_shardings=(replicated, replicated, mesh_lib.row_sharding(mesh)),
        )

    @property
    def num_batches(self) -> int:
        return pipeline.num_eval_batches(self._dataset, self._batch_size)

    @property
    def num_compilations(self) -> int:
        """Number of programs compiled so far."""
        return self._num_compilations

    def _evaluate_batch(
        self,
        model: FunctionalModel,
        variables: Variables,
        batch: dict[str, Array],
        *,
        height: int,
    ) -> tuple[Array, Array, Array]:
        self._num_compilations += 1  # this body runs when it is traced: once per shape
        data, settings = self._config.data, self._config.eval
        images, labels = (
            mesh_lib.unpad_height(batch[name], height, self._mesh) for name in ("image", "label")
        )
        ids = predict_ids(
            mesh_lib.spatially_partitioned(model, self._mesh),
            variables,
            normalize(images, data.mean, data.std),
            None if self._protocol.padding_is_image else batch["size"],
            scales=settings.scales,
            flip=settings.flip,
        )
        ids = mesh_lib.constrain_image_sharding(ids, self._mesh)
        return batch["index"], confusion_matrices(labels, ids, self._num_classes), ids

    def evaluate(
        self,
        variables: Variables,
        *,
        per_image: bool = False,
        boundary: bool = False,
        each: Callable[[Prediction], None] | None = None,
        progress: Callable[[], None] = lambda: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Evaluation | None:
        """Evaluates the split; None if `should_stop` returned True.

        Args:
          variables: of the model.
          per_image: keep the confusion matrix of each image.
          boundary: count boundaries too, which the host does and which takes time.
          each: called with each prediction of this process, in the order of the images.
          progress: called after each batch.
          should_stop: called before each batch.

        Raises:
          RuntimeError: an image was not counted exactly once.
        """
        settings = self._config.eval
        tally = _Tally(
            self._dataset,
            self._num_classes,
            num_pictures=settings.num_pictures,
            per_image=per_image,
            boundary=boundary,
            each=each,
        )
        if settings.window:
            run, rows = self._by_window(variables), [jax.process_index()]
        else:
            run = self._by_batch(variables)
            rows = mesh_lib.local_rows(self._mesh, self._batch_size)
        with pipeline.eval_batches(
            self._dataset,
            batch_size=self._batch_size,
            shape=self._protocol.shape(settings),
            rows=rows,
            fill=pipeline.mean_pixel(self._config.data),
            num_workers=0,  # threads: an evaluation ends before processes would pay off
            transform=self._protocol.prepare,
        ) as batches:
            for batch in batches:
                if should_stop():
                    return None
                tally.add(batch, run(batch))
                progress()
        if settings.window:
            tally.add_other_hosts()
        return tally.evaluation()

    def _by_batch(self, variables: Variables) -> Callable[[pipeline.EvalBatch], _BatchResult]:
        """Returns the function that evaluates a batch of whole images on all devices."""
        variables = self._fuse(mesh_lib.replicate(variables, self._mesh))

        def run(batch: pipeline.EvalBatch) -> _BatchResult:
            height, stride = batch["label"].shape[1], self._model.architecture.output_stride
            mesh_lib.check_height("evaluation", height, stride, self._mesh)
            placed = mesh_lib.to_global(batch, self._mesh, self._batch_size)
            index, matrices, ids = self._step(variables, placed, height=height)
            # Fetching waits for the device, which also bounds the number of batches in memory.
            return _BatchResult(
                jax.device_get(index),
                jax.device_get(matrices),
                lambda: mesh_lib.addressable_rows(ids),
            )

        return run

    def _by_window(self, variables: Variables) -> Callable[[pipeline.EvalBatch], _BatchResult]:
        """Returns the function that evaluates this host's image of a batch in windows."""
        data, settings = self._config.data, self._config.eval
        predictor = Predictor(
            self._model.fused,
            self._model.fuse(jax.device_get(mesh_lib.replicate(variables, self._mesh))),
            mean=data.mean,
            std=data.std,
            tta=TestTimeAugmentation(
                settings.scales, settings.flip, settings.window, settings.overlap
            ),
        )
        before = self._num_compilations

        def run(batch: pipeline.EvalBatch) -> _BatchResult:
            if batch["index"][0] < 0:  # fewer images are left than there are hosts
                zeros = np.zeros((1, self._num_classes, self._num_classes), np.int32)
                return _BatchResult(batch["index"], zeros, lambda: batch["label"])
            height, width = batch["size"][0]
            ids = predictor.ids(batch["image"][0, :height, :width]).astype(np.uint8)
            self._num_compilations = before + predictor.num_compilations
            matrix = confusion_matrix(batch["label"][0, :height, :width], ids, self._num_classes)
            return _BatchResult(batch["index"], matrix[None], lambda: ids[None])

        return run


class _Tally:
    """Adds up the results of batches and checks that each image is counted exactly once."""

    def __init__(
        self,
        dataset: Dataset,
        num_classes: int,
        *,
        num_pictures: int,
        per_image: bool,
        boundary: bool,
        each: Callable[[Prediction], None] | None,
    ) -> None:
        num_images = len(dataset.source)
        self._dataset = dataset
        self._num_pictures = num_pictures
        self._each = each
        self._predictions: list[Prediction] = []
        self._matrix = np.zeros((num_classes, num_classes), np.int64)
        self._times_counted = np.zeros(num_images, np.int64)
        self._matrices = self._boundary = None
        if per_image:
            self._matrices = np.zeros((num_images, num_classes, num_classes), np.int32)
        if boundary:
            self._boundary = np.zeros((num_images, num_classes, 2), np.int32)

    def add(self, batch: pipeline.EvalBatch, result: _BatchResult) -> None:
        counted = result.indices >= 0
        indices, matrices = result.indices[counted], result.matrices[counted]
        np.add.at(self._times_counted, indices, 1)
        self._matrix += matrices.sum(axis=0, dtype=np.int64)
        if self._matrices is not None:
            self._matrices[indices] = matrices
        if self._each or self._boundary is not None or self._needs_picture():
            self._add_rows(batch, result.fetch_ids())

    def _needs_picture(self) -> bool:
        return len(self._predictions) < self._num_pictures

    def _add_rows(self, batch: pipeline.EvalBatch, all_ids: np.ndarray) -> None:
        """Processes the rows of this process that hold an example, without their padding."""
        for row in np.flatnonzero(batch["index"] >= 0):
            index, (height, width) = batch["index"][row], batch["size"][row]
            inside = (row, slice(height), slice(width))
            image, label, ids = batch["image"][inside], batch["label"][inside], all_ids[inside]
            if self._boundary is not None:
                self._boundary[index] = count_boundary(label, ids, len(self._matrix))
            if self._each or self._needs_picture():
                name = self._dataset.source[int(index)]["name"]
                prediction = Prediction(name, image, label, ids)
                if self._needs_picture():
                    self._predictions.append(prediction)
                if self._each:
                    self._each(prediction)

    def add_other_hosts(self) -> None:
        """Adds the counts of the other hosts, where each host counts its own images only."""
        # As text: JAX would cut int64 to 32 bits.
        self._matrix = np.sum(multihost.allgather(self._matrix.tolist()), axis=0, dtype=np.int64)
        times = multihost.allgather(self._times_counted.tolist())
        self._times_counted = np.sum(times, axis=0, dtype=np.int64)
        if self._matrices is not None and jax.process_count() > 1:
            matrices = multihost_utils.process_allgather(self._matrices)
            self._matrices = matrices.sum(axis=0, dtype=np.int32)

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
            labels=self._dataset.labels,
            predictions=self._predictions,
            matrices=self._matrices,
            boundary_counts=boundary_counts,
        )
