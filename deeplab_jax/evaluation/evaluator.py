"""Evaluates a model on a split of a data set."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array

from deeplab_jax.config import Config, resolve_eval
from deeplab_jax.data import pipeline
from deeplab_jax.data.dataset import Dataset
from deeplab_jax.distributed import mesh as mesh_lib
from deeplab_jax.distributed import multihost
from deeplab_jax.evaluation.confusion import confusion_matrices, confusion_matrix
from deeplab_jax.evaluation.protocols import PROTOCOLS
from deeplab_jax.evaluation.tally import BatchResult, Evaluation, Prediction, Tally
from deeplab_jax.inference import predictor
from deeplab_jax.inference.compilation import jit_inference
from deeplab_jax.inference.positive import PositiveClass
from deeplab_jax.inference.predictor import Predictor, TestTimeAugmentation
from deeplab_jax.inference.views import predict_ids
from deeplab_jax.models.functional import FunctionalModel, Variables, normalize


class Evaluator:
    """Evaluates variables of one model on one split, under the protocol that the config names.

    Each valid pixel of each image is scored once, at the size that the protocol gives to labels.
    One program is compiled for each shape of batches.
    """

    def __init__(
        self,
        model: FunctionalModel,
        dataset: Dataset,
        config: Config,
        mesh: Mesh,
        positive: PositiveClass | None = None,
    ) -> None:
        """Prepares an evaluation, by the sections `data` and `eval` of the config.

        `positive` is the class whose curves are computed; its threshold, if any, also makes the
        ids.
        """
        self._settings = resolve_eval(config)
        stride = self._settings.output_stride
        self._model = model if stride is None else model.at_output_stride(stride)
        self._num_classes = model.architecture.num_classes
        self.dataset = dataset
        self._config = config
        self._protocol = PROTOCOLS[self._settings.protocol]
        self._mesh = mesh
        self.positive = positive
        # Padding rows are not counted, so the batch may grow to a multiple of the devices.
        devices = mesh.shape[mesh_lib.DATA]
        self._batch_size = -(-self._settings.batch_size // devices) * devices
        if self._settings.window:  # each host takes one image
            self._batch_size = jax.process_count()
        self.num_compilations = 0
        replicated = mesh_lib.replicated(mesh)
        self._step = jit_inference(
            self._evaluate_batch,
            self._model.fused,
            static_argnames="height",
            out_shardings=(replicated, replicated, mesh_lib.row_sharding(mesh)),
        )

    @property
    def num_batches(self) -> int:
        return pipeline.num_eval_batches(self.dataset, self._batch_size)

    def _evaluate_batch(
        self,
        model: FunctionalModel,
        variables: Variables,
        batch: dict[str, Array],
        positive: PositiveClass | None,
        *,
        height: int,
    ) -> tuple[Array, Array, tuple[Array, ...]]:
        self.num_compilations += 1  # this body runs when it is traced: once per shape
        data, settings = self._config.data, self._settings
        images, labels = (
            mesh_lib.unpad_height(batch[name], height, self._mesh) for name in ("image", "label")
        )
        ids, scores = predict_ids(
            mesh_lib.spatially_partitioned(model, self._mesh),
            variables,
            normalize(images, data.mean, data.std),
            None if self._protocol.padding_is_image else batch["size"],
            positive,
            scales=settings.scales,
            flip=settings.flip,
        )
        maps = (ids,) if scores is None else (ids, scores)
        predicted = tuple(mesh_lib.constrain_image_sharding(x, self._mesh) for x in maps)
        matrices = confusion_matrices(labels, predicted[0], self._num_classes)
        return batch["index"], matrices, predicted

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
        """Evaluates the split; None if `should_stop` returned True, called before each batch.

        Args:
          variables: of the model.
          per_image: keep the confusion matrix of each image.
          boundary: count boundaries too, which the host does and which takes time.
          each: called with each prediction of this process, in the order of the images.
          progress: called after each batch.

        Raises:
          RuntimeError: an image was not counted exactly once.
        """
        if not self._model.is_fused:
            variables = self._model.fuse(jax.device_get(mesh_lib.replicate(variables, self._mesh)))
        if self._settings.window:
            run, rows = self._by_image(variables), [jax.process_index()]
        else:
            run = self._by_batch(variables)
            rows = mesh_lib.local_rows(self._mesh, self._batch_size)
        tally = Tally(
            *(self.dataset, self._num_classes, rows, self._settings.num_pictures),
            per_image=per_image,
            boundary=boundary,
            positive=self.positive,
            each=each,
        )
        with pipeline.eval_batches(
            self.dataset,
            batch_size=self._batch_size,
            shape=self._protocol.shape(self._settings),
            rows=rows,
            fill=pipeline.mean_pixel(self._config.data),
            transform=self._protocol.prepare,
        ) as batches:
            padded: Iterator[pipeline.EvalBatch] = batches
            if jax.process_count() > 1 and not self._settings.window:
                padded = self._of_one_shape(batches)
            started: Iterator[Any] = ((batch, run(batch)) for batch in padded)
            # A result is added once the next batch is started: the devices compute it meanwhile.
            for (batch, result), _ in itertools.pairwise(itertools.chain(started, [None])):
                if should_stop():
                    return None
                tally.add(batch, result)
                progress()
        return tally.evaluation()

    def _of_one_shape(self, batches: Iterator[pipeline.EvalBatch]) -> Iterator[pipeline.EvalBatch]:
        """Pads the batches of each step to the largest height and width among all processes.

        The next shape is exchanged before a batch is evaluated. An exchange waits for the devices:
        if it came later, they would have no work at its end.
        """
        fill = pipeline.mean_pixel(self._config.data)
        started: Iterator[Any] = (
            (batch, multihost.start_max(batch["label"].shape[1:])) for batch in batches
        )
        for (batch, shape), _ in itertools.pairwise(itertools.chain(started, [None])):
            height, width = jax.device_get(shape).tolist()
            yield pipeline.pad_batch(batch, (height, width), fill)

    def _by_batch(self, variables: Variables) -> Callable[[pipeline.EvalBatch], BatchResult]:
        """Returns the function that evaluates a batch of images on all devices.

        A batch in which an image may be cut into windows, see `TestTimeAugmentation`, is evaluated
        as `_by_image` does.
        """
        by_image = self._by_image(variables)
        variables = mesh_lib.replicate(variables, self._mesh)

        def run(batch: pipeline.EvalBatch) -> BatchResult:
            padded = math.prod(batch["label"].shape[1:])  # on all hosts the same
            if self._settings.window is None and padded > predictor.LARGE_IMAGE:
                return by_image(batch)
            height, stride = batch["label"].shape[1], self._model.architecture.output_stride
            mesh_lib.check_height("evaluation", height, stride, self._mesh)
            arrays = {name: x for name, x in batch.items() if name != "name"}
            placed = mesh_lib.to_global(arrays, self._mesh, self._batch_size)
            index, matrices, predicted = self._step(variables, placed, self.positive, height=height)
            return index, matrices, lambda: list(map(mesh_lib.addressable_rows, predicted))

        return run

    def _by_image(self, variables: Variables) -> Callable[[pipeline.EvalBatch], BatchResult]:
        """Returns the function that evaluates the images of a batch as `Segmenter.predict` does.

        Each host evaluates its own images, one after the other, on one device.
        """
        settings = self._settings

        @functools.cache
        def predict() -> Predictor:
            return Predictor(
                self._model.fused,
                variables,
                mean=self._config.data.mean,
                std=self._config.data.std,
                tta=TestTimeAugmentation(
                    settings.scales, settings.flip, settings.window, settings.overlap
                ),
            )

        def run(batch: pipeline.EvalBatch) -> BatchResult:
            before = predict().num_compilations
            labels = batch["label"]
            maps = [np.zeros_like(labels)]  # of ids; and of scores
            if self.positive is not None:
                maps.append(np.zeros(labels.shape, np.float32))
            matrices = np.zeros((len(labels), self._num_classes, self._num_classes), np.int32)
            for row in np.flatnonzero(batch["index"] >= 0):
                height, width = batch["size"][row]
                inside = (row, slice(height), slice(width))
                predicted = predict().ids_and_scores(batch["image"][inside], self.positive)
                for whole, part in zip(maps, predicted, strict=False):
                    whole[inside] = part
                matrices[row] = confusion_matrix(labels[inside], maps[0][inside], self._num_classes)
            self.num_compilations += predict().num_compilations - before
            indices = multihost_utils.process_allgather(batch["index"]).reshape(-1)
            matrices = multihost_utils.process_allgather(matrices).reshape(-1, *matrices.shape[1:])
            # Hosts along the height of images have the same rows.
            _, first = np.unique(indices, return_index=True)
            return indices[first], matrices[first], lambda: maps

        return run
