"""The smallest real run, shared by tests of training."""

import dataclasses
import os
import pathlib
import subprocess
import sys
from unittest import mock

import jax
import numpy as np

from deeplab_jax import data as data_lib
from deeplab_jax.config import (
    Config,
    DataConfig,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    ShapesConfig,
    TrainConfig,
)
from deeplab_jax.data import pipeline
from deeplab_jax.data.dataset import Dataset
from deeplab_jax.distributed import mesh as mesh_lib
from deeplab_jax.evaluation import binary
from deeplab_jax.evaluation.evaluator import Evaluator
from deeplab_jax.inference.positive import PositiveClass
from deeplab_jax.models.functional import FunctionalModel
from deeplab_jax.training.state import abstract_state, init_state, shardings_of
from deeplab_jax.training.step import make_train_step
from deeplab_jax.training.train import resolve_architecture
from random_modules import random_variables

ROOT = pathlib.Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "train.py", "--config", "tests/tiny.py"]


def get_config(**fields) -> Config:
    """Returns the config of a run that takes seconds, with fields such as `train__steps`."""
    config = Config(
        model=ModelConfig(architecture="paper_resnet18", width=0.125, bn_momentum=0.9),
        data=DataConfig(
            name="shapes",
            split="train",
            crop_size=(33,),
            num_workers=0,
            shapes=ShapesConfig(size=32, num_train=24, num_eval=5),
        ),
        optimizer=OptimizerConfig(learning_rate=0.05),
        train=TrainConfig(steps=8, batch_size=8, log_every=2, eval_every=4, save_every=2),
        eval=EvalConfig(batch_size=3, size=33, num_pictures=2),
        mesh=MeshConfig(data=1),
    )
    for name, value in fields.items():
        branch, _, field = name.rpartition("__")
        setattr(getattr(config, branch) if branch else config, field, value)
    return config


def short_config(**fields) -> Config:
    """Returns the config of four steps of the smallest model, evaluated at the end only."""
    short = {"model__width": 0.0625, "train__steps": 4, "train__eval_every": 0}
    return get_config(**short | fields)


class Run:
    """The parts of a run, for tests that make single steps."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.mesh = mesh_lib.make_mesh(config.mesh)
        self.dataset = data_lib.load(config.data, config.data.split)
        self.model = FunctionalModel(resolve_architecture(config, self.dataset))
        self.step = make_train_step(self.model, config, self.mesh)

    def start(self):
        variables = self.model.init(jax.random.key(self.config.seed))
        shardings = shardings_of(abstract_state(self.config, self.model, self.mesh))
        return mesh_lib.device_put(init_state(self.config, variables), shardings)

    def batches(self, steps: int):
        batch_size = self.config.train.batch_size
        batches = pipeline.train_batches(
            self.dataset,
            self.config.data,
            batch_size=batch_size,
            seed=self.config.seed,
            start_step=0,
        )
        return [mesh_lib.to_global(next(batches), self.mesh, batch_size) for _ in range(steps)]

    def train(self, steps: int):
        """State and metrics after each of the first steps."""
        state, history = self.start(), []
        for batch in self.batches(steps):
            state, metrics = self.step(state, batch)
            history.append({name: float(value) for name, value in metrics.items()})
        return state, history


def evaluate_windows(window: int | None = 33, positive: PositiveClass | None = None):
    """Counts of an evaluation window by window, of a model that was not trained."""
    config = get_config()
    config.data.shapes.size = 40
    config.eval.window, config.eval.protocol = window, "native"
    config.mesh.data = jax.process_count()
    run = Run(config)
    dataset = data_lib.load(config.data, config.data.eval_split)
    evaluator = Evaluator(run.model, dataset, config, run.mesh, positive)
    with mock.patch.object(binary, "MAX_EXACT", 0):  # a histogram, as of several processes
        evaluation = evaluator.evaluate(random_variables(run.model), per_image=True)
    curves = evaluation.curves
    return {
        "curves": [x.tolist() for x in dataclasses.astuple(curves)] if curves else None,
        "images": evaluation.num_images,
        "matrix": evaluation.matrix.tolist(),
        "matrices": evaluation.matrices.tolist(),
    }


class Recording:
    """Images of noise, of different sizes, that lists the indices that are read."""

    # Of four images in a batch one may be larger than the others; the last batch is not full.
    SIZES = ((20, 30), (33, 33), (20, 150), (40, 50), *[(30, 20)] * 4, (20, 150), (33, 20))

    def __init__(self):
        self.read = []

    def __len__(self):
        return len(self.SIZES)

    def __getitem__(self, index):
        self.read.append(index)
        pixels = np.random.default_rng(index).integers(0, 256, (*self.SIZES[index], 3), np.uint8)
        return {"image": pixels, "label": pixels[..., 0] % 4, "name": f"image {index}"}


# Arguments of `evaluate_recorded`.
EVALUATIONS = {"paper": ("paper",), "native": ("native",), "windows": ("native", 33)}


def evaluate_recorded(protocol: str, window: int = 0):
    """Counts of an evaluation on four devices, and what this process read and predicted."""
    config = get_config()
    config.eval.batch_size, config.eval.protocol, config.eval.window = 4, protocol, window
    config.mesh.data = 4
    run, source, names = Run(config), Recording(), []
    evaluator = Evaluator(run.model, Dataset(source, run.dataset.labels), config, run.mesh)
    evaluation = evaluator.evaluate(
        random_variables(run.model), per_image=True, each=lambda one: names.append(one.name)
    )
    return {"matrices": evaluation.matrices.tolist(), "read": sorted(source.read), "names": names}


def saved_state(workdir):
    """Everything that a workdir's newest checkpoint holds, as NumPy arrays by name."""
    from orbax.checkpoint import v1 as ocp

    folder = workdir / "checkpoints"
    newest = max((child for child in folder.iterdir() if child.name.isdigit()), key=_number)
    metadata = ocp.checkpointables_metadata(newest).metadata
    # Into arrays of the host: the devices that they were saved from may not be here.
    hosts = jax.tree.map(
        lambda leaf: np.empty(leaf.shape, leaf.dtype),
        {k: metadata[k] for k in ("model", "training")},
    )
    leaves = jax.tree_util.tree_leaves_with_path(ocp.load_checkpointables(newest, hosts))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def _number(path) -> int:
    return int(path.name)


def start_command(workdir, *flags):
    """Starts `train.py` with this file's config in another process."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    return subprocess.Popen(
        [*COMMAND, "--workdir", str(workdir), *flags],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """Waits for a process of `start_command`, which must succeed; its stdout and stderr."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out, err
