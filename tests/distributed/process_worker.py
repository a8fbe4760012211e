"""One process of `test_processes.py`: runs checks between processes, then fails or is killed.

Arguments: host:port of process 0, number of processes, index of this one, folder, ending. Prints
each outcome as a line of JSON.
"""

import contextlib
import importlib.metadata
import json
import os
import pathlib
import shutil
import signal
import sys
from unittest import mock

import cv2
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import tiny
from deeplab_jax.config import MeshConfig
from deeplab_jax.distributed import launch, multihost
from deeplab_jax.distributed import mesh as mesh_lib
from deeplab_jax.distributed.preemption import PreemptionHandler
from deeplab_jax.inference import predictor
from deeplab_jax.inference.positive import PositiveClass
from deeplab_jax.inference.predictor import Predictor
from deeplab_jax.models.functional import Variables
from deeplab_jax.training import provenance
from deeplab_jax.training.checkpoint import Checkpoints
from deeplab_jax.training.state import TrainState
from deeplab_jax.training.train import load_parts
from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights import saved_model


def report(name, action):
    try:
        outcome = action()
    except UserError as error:
        outcome = f"refused: {error}"
    print(json.dumps({name: outcome}), flush=True)


def check(seed=0, shapes_seed=0):
    config = tiny.get_config()
    config.data.shapes.seed, config.mesh.data = shapes_seed, -1
    parts = load_parts(config, lambda inputs: None, quiet=True)
    facts = {"config.seed": seed, "config.data.shapes.seed": shapes_seed}
    multihost.check_equal(facts | parts.inputs | parts.origin.facts)


def check_versions(number):
    true_version = importlib.metadata.version

    def version(name):
        return "0.0" if name in ("optax", "pillow") else true_version(name)

    with contextlib.ExitStack() as stack:
        if number == 1:
            stack.enter_context(mock.patch("importlib.metadata.version", version))
            stack.enter_context(
                mock.patch.object(provenance, "source_digest", return_value="changed")
            )
            stack.enter_context(mock.patch("cv2.__version__", "4.13.0"))
        check()


def check_warp(number):
    """Process 1 has the same versions, but another OpenCV inside."""
    warp = cv2.warpAffine

    def other_warp(image, *arguments):
        return np.bitwise_xor(warped := warp(image, *arguments), 1, out=warped)

    with mock.patch("cv2.warpAffine", other_warp if number else warp):
        check()


def raise_mistakes(mistakes):
    with multihost.raise_on_all_hosts():
        mistake = mistakes[jax.process_index()]
        if mistake is not None:
            raise mistake


def windows(*arguments):
    """Evaluates window by window: the counts, and how many images this process saw."""
    seen = []
    true_method = Predictor.ids_and_scores
    Predictor.ids_and_scores = lambda *arguments: seen.append(1) or true_method(*arguments)
    try:
        return tiny.evaluate_windows(*arguments) | {"seen": len(seen)}
    finally:
        Predictor.ids_and_scores = true_method


def stops(number):
    """Calls `should_stop` four times; process 1 gets SIGTERM before the second call."""
    answers = []
    with PreemptionHandler() as stop:
        for turn in range(4):
            if number == 1 and turn == 1:
                signal.raise_signal(signal.SIGTERM)
            answers.append(stop.should_stop())
        return [answers, stop.name]


def restore_copies(number, folder):
    """Saves, and restores from a copy of each process; then that of process 1 is damaged."""

    def open_copy(outcome):
        own = folder / f"copy-{number}" / "checkpoints"
        checkpoints = Checkpoints(own, keep=1, log=print, is_copied=True)
        try:
            return outcome(checkpoints, own)
        finally:
            checkpoints.close()

    replicated = NamedSharding(mesh_lib.make_mesh(MeshConfig(data=-1)), PartitionSpec())
    variables = Variables({"w": np.arange(3.0, dtype=np.float32)}, {"m": np.ones(3, np.float32)})
    state = TrainState(np.int32(2), variables, {"momentum": np.zeros(3, np.float32)}, None)
    state = jax.tree.map(lambda leaf: mesh_lib.device_put(leaf, replicated), state)

    def save(checkpoints, own):
        checkpoints.save(state, 2, {"format": 0}, None, wait=True)
        return len(list(own.rglob("*")))

    def restore(checkpoints, own):
        restored = checkpoints.restore(state)
        return [restored.step, np.asarray(restored.state.variables.params["w"]).tolist()]

    report("save a copy", lambda: open_copy(save))
    multihost.allgather("saved")
    if number == 1:
        shutil.copytree(folder / "copy-0", folder / "copy-1", dirs_exist_ok=True)
    report("restore a copy", lambda: open_copy(restore))
    if number == 0:  # alone, as who claims a workdir does
        report("find a copy", lambda: saved_model.find_checkpoint(folder / "copy-0").name)
    if number == 1:
        shutil.rmtree(folder / "copy-1" / "checkpoints" / "2" / "model")
    report("restore a damaged copy", lambda: open_copy(restore))


def agree(number, folder):
    multihost._VISIBLE_SECONDS = 0.5
    own = folder / str(number)
    own.mkdir()
    report("gather", lambda: [len(text) for text in multihost.allgather("ä" * (5 + 5000 * number))])
    report("same", check)
    report("config", lambda: check(seed=number))
    report("data", lambda: check(shapes_seed=number))
    report("versions", lambda: check_versions(number))
    report("warp", lambda: check_warp(number))
    report("one fails", lambda: raise_mistakes([None, UserError("no folder x")]))
    report("both fail alike", lambda: raise_mistakes([UserError("no folder x")] * 2))
    report("one folder", lambda: multihost.check_shared(folder))
    report("two folders", lambda: multihost.check_shared(own))
    positive = PositiveClass(1, 0.2)
    report("windows", lambda: windows(33, positive))
    report("batches", lambda: tiny.evaluate_windows(0, positive))
    predictor.LARGE_IMAGE, predictor.DEFAULT_WINDOW = 0, 33
    report("large images", lambda: windows(None))
    report("stop", lambda: stops(number))
    restore_copies(number, folder)


def main():
    coordinator, count, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    folder, ending = pathlib.Path(sys.argv[4]), sys.argv[5]
    lost_timeout = 60 if ending == "evaluations" else 4
    options = launch.LaunchOptions(coordinator, count, number, 60, lost_timeout)
    with launch.distributed_run(options):
        if ending == "evaluations":
            for name, arguments in tiny.EVALUATIONS.items():
                report(name, lambda arguments=arguments: tiny.evaluate_recorded(*arguments))
            return
        if ending == "mistake":
            agree(number, folder)
        multihost.allgather("all are here")
        if number == 1 and ending == "mistake":
            raise UserError("a damaged image")
        if number == 1 and ending == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        multihost.allgather("never complete")


if __name__ == "__main__":
    main()
