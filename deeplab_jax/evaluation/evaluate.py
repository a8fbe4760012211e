"""Whole-image evaluation of a model on a split of a data set."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from deeplab_jax.config import Config
from deeplab_jax.data import pipeline
from deeplab_jax.data.dataset import Dataset
from deeplab_jax.evaluation.confusion import Scores, confusion_matrix, scores
from deeplab_jax.models.functional import FunctionalModel, Variables, normalize
from deeplab_jax.parallel.mesh import batch_sharding, host_rows, replicated, to_global


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One image of a split with what the model made of it, at the labels' resolution."""

    name: str
    image: np.ndarray  # uint8 [h, w, c]
    label: np.ndarray  # uint8 [h, w]
    ids: np.ndarray  # uint8 [h, w]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluation gives."""

    matrix: np.ndarray  # int64 [classes, classes], true by predicted
    images: int
    predictions: list[Prediction]  # of the first images

    @property
    def scores(self) -> Scores:
        return scores(self.matrix)


class Evaluator:
    """Evaluates variables of one model on one split; compiles one program a bucket of sizes.

    Images are padded, not resized, so that labels are scored at their own resolution, each valid
    pixel of each image once.
    """

    def __init__(self, model: FunctionalModel, dataset: Dataset, config: Config, mesh: Mesh):
        stride = config.eval.output_stride
        self._model = model
        if stride is not None:
            self._model = FunctionalModel(model.architecture.at_output_stride(stride))
        self._dataset = dataset
        self._config = config
        self._rows = batch_sharding(mesh)
        # Padding rows count nowhere, so the batch may grow to what the devices divide.
        self._batch_size = -(-config.eval.batch_size // mesh.size) * mesh.size
        self._step = jax.jit(
            self._evaluate_batch,
            in_shardings=(replicated(mesh), self._rows),
            out_shardings=(replicated(mesh), replicated(mesh), self._rows),
        )

    @property
    def num_batches(self) -> int:
        return pipeline.num_eval_batches(self._dataset, self._batch_size)

    def _evaluate_batch(
        self, variables: Variables, batch: dict[str, Array]
    ) -> tuple[Array, Array, Array]:
        data = self._config.data
        outputs, _ = self._model.apply(variables, normalize(batch["image"], data.mean, data.std))
        ids = jnp.argmax(outputs["out"], axis=-1).astype(jnp.uint8)
        matrix = confusion_matrix(batch["label"], ids, self._model.architecture.num_classes)
        return matrix, jnp.sum(batch["index"] >= 0), ids

    def evaluate(
        self,
        variables: Variables,
        *,
        progress: Callable[[], None] = lambda: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Evaluation | None:
        """Confusion matrix over the split, or None if it was told to stop.

        Args:
          variables: of the model.
          progress: called after each batch.
          should_stop: asked before each batch.

        Raises:
          RuntimeError: if not each image was counted exactly once.
        """
        matrices: list[np.ndarray] = []
        counts: list[int] = []
        predictions: list[Prediction] = []
        with pipeline.eval_batches(
            self._dataset,
            batch_size=self._batch_size,
            size=self._config.eval.size,
            rows=host_rows(self._batch_size),
            fill=pipeline.mean_pixel(self._config.data),
            num_workers=0,  # threads: an evaluation is over before processes would pay
        ) as batches:
            for batch in batches:
                if should_stop():
                    return None
                matrix, count, ids = self._step(variables, to_global(batch, self._rows))
                # Fetching waits for the device, which also bounds how many batches lie in memory.
                matrices.append(jax.device_get(matrix).astype(np.int64))
                counts.append(int(jax.device_get(count)))
                missing = self._config.eval.num_pictures - len(predictions)
                predictions += self._predictions(batch, ids, missing)
                progress()
        if sum(counts) != len(self._dataset.source):
            raise RuntimeError(
                f"{sum(counts)} images were evaluated of {len(self._dataset.source)}: each image "
                "must count exactly once"
            )
        return Evaluation(np.sum(matrices, axis=0), sum(counts), predictions)

    def _predictions(self, batch: pipeline.EvalBatch, ids: Array, limit: int) -> list[Prediction]:
        """The first images of a batch of this process, cut to their own sizes."""
        taken: list[Prediction] = []
        if limit <= 0:
            return taken
        local_ids = np.concatenate([np.asarray(shard.data) for shard in ids.addressable_shards])
        for row, index in enumerate(batch["index"][:limit]):
            if index >= 0:
                example = self._dataset.source[int(index)]
                height, width = example["label"].shape
                taken.append(
                    Prediction(
                        example["name"],
                        example["image"],
                        example["label"],
                        local_ids[row, :height, :width],
                    )
                )
        return taken
