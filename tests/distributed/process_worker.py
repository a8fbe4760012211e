"""One of several processes, as `test_processes.py` starts them: what they agree on, and a fault.

Arguments: host:port of process 0, number of processes, number of this one, folder, ending. Each
outcome is a line of JSON on stdout.
"""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import signal
import sys

import jax

import tiny
from deeplab_jax import data as data_lib
from deeplab_jax.distributed import launch as processes
from deeplab_jax.distributed import multihost
from deeplab_jax.distributed.preemption import PreemptionHandler
from deeplab_jax.evaluation import evaluator as evaluate
from deeplab_jax.utils.errors import UserError


def tell(name, action):
    try:
        outcome = action()
    except UserError as error:
        outcome = f"refused: {error}"
    print(json.dumps({name: outcome}), flush=True)


def check(seed=0, shapes_seed=0):
    config = tiny.get_config()
    config.data.shapes.seed = shapes_seed
    datasets = {split: data_lib.load(config.data, split) for split in ("train", "val")}
    multihost.check(dataclasses.replace(config, seed=seed), datasets)


def check_versions(number):
    true_version, true_digest = importlib.metadata.version, multihost.source_digest
    if number == 1:
        importlib.metadata.version = lambda name: "0.0" if name == "optax" else true_version(name)
        multihost.source_digest = lambda: "changed"
    try:
        check()
    finally:
        importlib.metadata.version, multihost.source_digest = true_version, true_digest


def together(mistakes):
    with multihost.raise_on_all_hosts():
        mistake = mistakes[jax.process_index()]
        if mistake is not None:
            raise mistake


def windows():
    """An evaluation window by window: its counts, and how many images this process saw."""
    seen = []
    true_ids = evaluate.Predictor.ids
    evaluate.Predictor.ids = lambda self, image: seen.append(1) or true_ids(self, image)
    return tiny.evaluate_windows() | {"seen": len(seen)}


def stops(number):
    """Answers to four questions, of which process 1 is asked to stop before the second."""
    answers = []
    with PreemptionHandler() as stop:
        for turn in range(4):
            if number == 1 and turn == 1:
                signal.raise_signal(signal.SIGTERM)
            answers.append(stop.should_stop())
        return [answers, stop.name]


def agree(number, folder):
    multihost._VISIBLE_SECONDS = 0.5
    own = folder / str(number)
    own.mkdir()
    tell("gather", lambda: [len(text) for text in multihost.allgather("ä" * (5 + 5000 * number))])
    tell("same", check)
    tell("config", lambda: check(seed=number))
    tell("data", lambda: check(shapes_seed=number))
    tell("versions", lambda: check_versions(number))
    tell("one fails", lambda: together([None, UserError("no folder x")]))
    tell("both fail alike", lambda: together([UserError("no folder x")] * 2))
    tell("one folder", lambda: multihost.check_shared(folder))
    tell("two folders", lambda: multihost.check_shared(own))
    tell("windows", windows)
    tell("stop", lambda: stops(number))


def main():
    coordinator, count, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    folder, ending = pathlib.Path(sys.argv[4]), sys.argv[5]
    with processes.started(processes.Launch(coordinator, count, number, 60, 4)):
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
