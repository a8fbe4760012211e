"""Evaluation of a model on a split of a data set."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

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
from deeplab_jax.evaluation.boundary import count_boundary
from deeplab_jax.evaluation.confusion import Scores, confusion_matrices, count, scores
from deeplab_jax.evaluation.protocols import PROTOCOLS
from deeplab_jax.inference.compile import jit_inference
from deeplab_jax.inference.predictor import Predictor, TestTimeAugmentation, class_ids
from deeplab_jax.models.functional import FunctionalModel, Variables


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One image of a split with what the model made of it, at the size at which it is scored."""

    name: str
    image: np.ndarray  # uint8 [h, w, c]
    label: np.ndarray  # uint8 [h, w]
    ids: np.ndarray  # uint8 [h, w]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluation gives.

    Attributes:
      matrix: int64 `[classes, classes]`, pixels by true and predicted class, over all images.
      images: how many there were.
      labels: names and colours of the classes.
      predictions: of the first images.
      matrices: int32 `[images, classes, classes]`, the matrix of each image, in order; None
        unless they were asked for.
      boundary: int64 `[classes, 2]`, pixels in the intersection and union of boundaries, see
        `count_boundary`; None unless they were asked for.
    """

    matrix: np.ndarray
    images: int
    labels: LabelSet
    predictions: list[Prediction]
    matrices: np.ndarray | None
    boundary: np.ndarray | None

    @property
    def scores(self) -> Scores:
        has_background = self.labels.names[0] == "background"
        return scores(self.matrix, background=0 if has_background else None)


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """What is known of one batch.

    Attributes:
      index: int32 `[b]` of examples; -1 for rows without one. Over all hosts, but window by window
        of this host alone.
      matrices: int32 `[b, classes, classes]`, likewise.
      ids: gives uint8 `[rows, h, w]` of this host's rows, which stay on the devices until then.
    """

    index: np.ndarray
    matrices: np.ndarray
    ids: Callable[[], np.ndarray]


class Evaluator:
    """Evaluates variables of one model on one split, under the protocol that the config names.

    Labels are scored at the size that the protocol gives them, each valid pixel of each image
    once. One program is compiled for each shape of batches.
    """

    def __init__(self, model: FunctionalModel, dataset: Dataset, config: Config, mesh: Mesh):
        stride = config.eval.output_stride
        self._model = model if stride is None else model.at_output_stride(stride)
        self._num_classes = model.architecture.num_classes
        self._dataset = dataset
        self._config = config
        self._protocol = PROTOCOLS[config.eval.protocol]
        self._mesh = mesh
        # Padding rows count nowhere, so the batch may grow to what the devices divide.
        devices = mesh.shape[mesh_lib.DATA]
        self._batch_size = -(-config.eval.batch_size // devices) * devices
        if config.eval.window:  # each host takes one image
            self._batch_size = jax.process_count()
        self._num_compilations = 0
        whole = mesh_lib.replicated(mesh)
        self._fuse = jax.jit(self._model.fuse)
        self._step = jit_inference(
            self._evaluate_batch,
            self._model.fused,
            static_argnames="height",
            out_shardings=(whole, whole, mesh_lib.row_sharding(mesh)),
        )

    @property
    def num_batches(self) -> int:
        return pipeline.num_eval_batches(self._dataset, self._batch_size)

    @property
    def num_compilations(self) -> int:
        """Programs that evaluations have needed so far."""
        return self._num_compilations

    def _evaluate_batch(
        self,
        model: FunctionalModel,
        variables: Variables,
        batch: dict[str, Array],
        *,
        height: int,
    ) -> tuple[Array, Array, Array]:
        self._num_compilations += 1  # this body runs when it is traced: once a shape
        images = {n: mesh_lib.fit_height(batch[n], height, self._mesh) for n in ("image", "label")}
        batch = batch | images
        model = mesh_lib.partitioned(model, self._mesh)
        ids = mesh_lib.divide_height(self._ids(model, variables, batch), self._mesh)
        matrices = confusion_matrices(batch["label"], ids, self._num_classes)
        return batch["index"], matrices, ids

    def _ids(self, model: FunctionalModel, variables: Variables, batch: dict[str, Array]) -> Array:
        """The class of each pixel, uint8 `[b, h, w]`."""
        data, settings = self._config.data, self._config.eval
        return class_ids(
            model,
            variables,
            batch["image"],
            None if self._protocol.padding_is_image else batch["size"],
            mean=data.mean,
            std=data.std,
            scales=settings.scales,
            flip=settings.flip,
        )

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
        """Confusion matrix over the split, or None if it was told to stop.

        Args:
          variables: of the model.
          per_image: keep the matrix of each image.
          boundary: count boundaries too, which is done on the host and takes its time.
          each: given each prediction of this process, in the order of the images.
          progress: called after each batch.
          should_stop: asked before each batch.

        Raises:
          RuntimeError: if not each image was counted exactly once.
        """
        tally = _Tally(len(self._dataset.source), self._num_classes, per_image, boundary)
        run = self._windows(variables) if self._config.eval.window else self._whole(variables)
        predictions: list[Prediction] = []
        with self._batches() as batches:
            for batch in batches:
                if should_stop():
                    return None
                outcome = run(batch)
                tally.add(batch, outcome)
                missing = self._config.eval.num_pictures - len(predictions)
                predictions += self._predictions(batch, outcome, missing)
                if each is not None:
                    for prediction in self._predictions(batch, outcome, self._batch_size):
                        each(prediction)
                progress()
        if self._config.eval.window:
            tally.add_other_hosts()
        return tally.result(self._dataset.labels, predictions)

    def _batches(self) -> pipeline.Batches[pipeline.EvalBatch]:
        return pipeline.eval_batches(
            self._dataset,
            batch_size=self._batch_size,
            shape=self._protocol.shape(self._config.eval),
            rows=self._local_rows(),
            fill=pipeline.mean_pixel(self._config.data),
            num_workers=0,  # threads: an evaluation is over before processes would pay
            prepare=self._protocol.prepare,
        )

    def _local_rows(self) -> list[int]:
        if self._config.eval.window:
            return [jax.process_index()]
        return mesh_lib.local_rows(self._mesh, self._batch_size)

    def _whole(self, variables: Variables) -> Callable[[pipeline.EvalBatch], _Outcome]:
        """Evaluates a batch of whole images on all devices."""
        variables = self._fuse(mesh_lib.replicate(variables, self._mesh))

        def run(batch: pipeline.EvalBatch) -> _Outcome:
            height, stride = batch["label"].shape[1], self._model.architecture.output_stride
            mesh_lib.check_height("evaluation", height, stride, self._mesh)
            placed = mesh_lib.to_global(batch, self._mesh, self._batch_size)
            index, matrices, ids = self._step(variables, placed, height=height)
            # Fetching waits for the device, which also bounds how many batches lie in memory.
            return _Outcome(
                jax.device_get(index),
                jax.device_get(matrices),
                lambda: mesh_lib.rows_of(ids),
            )

        return run

    def _windows(self, variables: Variables) -> Callable[[pipeline.EvalBatch], _Outcome]:
        """Evaluates this host's image of a batch window by window."""
        data, settings = self._config.data, self._config.eval
        inference = Predictor(
            self._model.fused,
            self._model.fuse(jax.device_get(mesh_lib.replicate(variables, self._mesh))),
            mean=data.mean,
            std=data.std,
            mode=TestTimeAugmentation(
                tuple(settings.scales), settings.flip, settings.window, settings.overlap
            ),
        )
        before = self._num_compilations

        def run(batch: pipeline.EvalBatch) -> _Outcome:
            if batch["index"][0] < 0:  # the hosts do not divide the images
                nothing = np.zeros((1, self._num_classes, self._num_classes), np.int32)
                return _Outcome(batch["index"], nothing, lambda: batch["label"])
            height, width = batch["size"][0]
            ids = inference.ids(batch["image"][0, :height, :width]).astype(np.uint8)
            self._num_compilations = before + inference.num_compilations
            matrix = count(batch["label"][0, :height, :width], ids, self._num_classes)
            return _Outcome(batch["index"], matrix[None], lambda: ids[None])

        return run

    def _predictions(
        self, batch: pipeline.EvalBatch, outcome: _Outcome, limit: int
    ) -> list[Prediction]:
        """The first images of a batch of this process, cut to their own sizes."""
        if limit <= 0:
            return []
        return [
            Prediction(self._dataset.source[index]["name"], image, label, ids)
            for index, image, label, ids in _rows_of(batch, outcome)
        ][:limit]


def _rows_of(
    batch: pipeline.EvalBatch, outcome: _Outcome
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """(index, image, label, ids) of each row that holds an example, without its padding."""
    all_ids = outcome.ids()
    for row, (index, (height, width)) in enumerate(zip(batch["index"], batch["size"], strict=True)):
        if index >= 0:
            inside = (row, slice(height), slice(width))
            yield int(index), batch["image"][inside], batch["label"][inside], all_ids[inside]


class _Tally:
    """Adds up outcomes, and sees that each image is counted exactly once."""

    def __init__(self, num_images: int, num_classes: int, per_image: bool, boundary: bool) -> None:
        self._matrix = np.zeros((num_classes, num_classes), np.int64)
        self._times_counted = np.zeros(num_images, np.int64)
        self._matrices = self._boundary = None
        if per_image:
            self._matrices = np.zeros((num_images, num_classes, num_classes), np.int32)
        if boundary:
            self._boundary = np.zeros((num_images, num_classes, 2), np.int32)

    def add(self, batch: pipeline.EvalBatch, outcome: _Outcome) -> None:
        known = outcome.index >= 0
        index, matrices = outcome.index[known], outcome.matrices[known]
        np.add.at(self._times_counted, index, 1)
        self._matrix += matrices.sum(axis=0, dtype=np.int64)
        if self._matrices is not None:
            self._matrices[index] = matrices
        if self._boundary is not None:
            for place, _, label, ids in _rows_of(batch, outcome):
                self._boundary[place] = count_boundary(label, ids, len(self._matrix))

    def add_other_hosts(self) -> None:
        """Adds what the other hosts counted, where each counts images of its own alone."""
        # As text: JAX would cut int64 to 32 bits.
        self._matrix = np.sum(multihost.allgather(self._matrix.tolist()), axis=0, dtype=np.int64)
        times = multihost.allgather(self._times_counted.tolist())
        self._times_counted = np.sum(times, axis=0, dtype=np.int64)
        if self._matrices is not None and jax.process_count() > 1:
            everywhere = multihost_utils.process_allgather(self._matrices)
            self._matrices = everywhere.sum(axis=0, dtype=np.int32)

    def result(self, labels: LabelSet, predictions: list[Prediction]) -> Evaluation:
        if np.any(self._times_counted != 1):
            raise RuntimeError(
                f"images {np.flatnonzero(self._times_counted != 1).tolist()} of "
                f"{len(self._times_counted)} were not counted exactly once"
            )
        boundary = None
        if self._boundary is not None:
            # Each host counted its own rows, and left zeros in the others.
            everywhere = multihost_utils.process_allgather(self._boundary)
            boundary = everywhere.max(axis=0).sum(axis=0, dtype=np.int64)
        return Evaluation(
            self._matrix, len(self._times_counted), labels, predictions, self._matrices, boundary
        )
