"""Batches pass through shared memory unharmed; workers end with their process, and are named."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import cloudpickle
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from deeplab_jax import data
from deeplab_jax.data import prefetch
from deeplab_jax.data.prefetch import BatchIterator
from deeplab_jax.utils.errors import UserError

# Workers cannot always import the modules of tests.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

SHAPES = {"image": (2, 37, 41, 3), "index": (2,)}


def fill(step, out):
    """The batch is a function of the step."""
    image = out["image"]
    image[:] = np.arange(image.size, dtype=np.uint8).reshape(image.shape) + np.uint8(step % 256)
    out["index"][:] = step % 256
    return out


def numbers(start, num_workers, stop=2**40, act=lambda step: None):
    """Iterates over the batches of `fill`; `act` is called before each is made."""

    def make(step, out):
        act(step)
        return fill(step, out)

    return BatchIterator(make, range(start, stop), num_workers, SHAPES)


def batch_at(step):
    return fill(step, prefetch.empty_arrays(SHAPES))


def assert_is(batch, step):
    expected = batch_at(step)
    assert batch.keys() == expected.keys()
    for name, array in batch.items():
        assert type(array) is np.ndarray
        np.testing.assert_array_equal(array, expected[name], strict=True)


def start_of(batch):
    return batch["image"].ctypes.data


def processes(batches):
    return list(batches._batches._workers.values())


# The memory of batches.


def test_slots_are_used_again_when_their_batches_are_gone():
    with numbers(5, num_workers=2) as batches:
        starts = set()
        for step in range(5, 60):
            batch = next(batches)
            assert_is(batch, step)
            starts.add(start_of(batch))
            assert not batch["image"].flags.owndata
            assert start_of(batch) % 64 == batch["index"].ctypes.data % 64 == 0
        assert len(starts) == 2 * 2 + prefetch._MAX_HELD


def test_batches_that_are_kept_stay_as_they_are():
    """Also through views and other libraries' references; more than there are slots."""
    with numbers(0, num_workers=1) as batches:
        kept = [next(batches) for _ in range(20)]
        owned = [batch["image"].flags.owndata for batch in kept]
        assert owned == [False] * prefetch._MAX_HELD + [True] * (20 - prefetch._MAX_HELD)
        row = kept[0]["image"][1:, ::2]
        buffer = memoryview(kept[1]["index"])
        expected = row.copy()
        for step, batch in enumerate(kept):
            assert_is(batch, step)
        del kept, batch
        for step in range(20, 40):
            assert_is(next(batches), step)
        np.testing.assert_array_equal(row, expected)
        assert list(buffer) == [1, 1]
    np.testing.assert_array_equal(row, expected)  # after the end, too


def test_arrays_of_jax_stay_as_they_are():
    """On CPU they may share a batch's memory, also when the NumPy array is gone."""
    sharding = NamedSharding(jax.make_mesh((1,), ("data",)), PartitionSpec())
    with numbers(0, num_workers=1) as batches:
        kept = [
            jax.make_array_from_process_local_data(sharding, next(batches)["image"])
            for _ in range(3)
        ]
        for step in range(3, 30):
            assert_is(next(batches), step)
        for step, array in enumerate(kept):
            np.testing.assert_array_equal(array, batch_at(step)["image"])


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_batches_come_in_order_however_long_they_take(num_workers):
    batches = numbers(3, num_workers, 30, lambda step: time.sleep(0.03 * (step % 4 == 0)))
    steps = [int(batch["index"][0]) for batch in batches]
    assert steps == list(range(3, 30))


# What goes wrong.


def test_close_waits_for_the_workers():
    batches = numbers(0, num_workers=2)
    workers = processes(batches)
    assert [worker.poll() for worker in workers] == [None, None]
    batches.close()
    assert [worker.returncode for worker in workers] == [-signal.SIGKILL] * 2
    batches.close()
    with pytest.raises(StopIteration):
        next(batches)


def test_an_iterator_without_references_ends_its_workers():
    batches = numbers(0, num_workers=1)
    (worker,) = processes(batches)
    del batches
    assert worker.returncode == -signal.SIGKILL


@pytest.mark.parametrize("is_waiting", [False, True])
def test_a_worker_that_the_system_kills_is_named(is_waiting):
    batches = numbers(0, 2, act=lambda step: time.sleep(60 * (step >= 8 and is_waiting)))
    assert_is(next(batches), 0)
    workers = processes(batches)
    workers[1].send_signal(signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        list(batches)
    assert time.monotonic() - start < 2
    assert f"(pid {workers[1].pid}) ended with signal 9 (Killed)" in str(error.value)
    assert "config.data.num_workers" in str(error.value)
    assert all(worker.returncode is not None for worker in workers)
    with pytest.raises(StopIteration):
        next(batches)


def test_a_worker_that_exits_is_named():
    with pytest.raises(UserError, match=r"one of 1 processes .* ended with code 7"):
        list(numbers(0, num_workers=1, act=lambda step: os._exit(7)))


def test_memory_where_a_sandbox_forbids_anonymous_files(monkeypatch, tmp_path):
    def forbidden(name):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "memfd_create", forbidden)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with numbers(0, num_workers=1) as batches:
        for step in range(10):
            assert_is(next(batches), step)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("num_workers", "error", "raised"),
    [(0, KeyError, KeyError), (2, KeyError, RuntimeError), (2, UserError, UserError)],
)
def test_an_error_comes_at_its_step_and_ends_the_workers(num_workers, error, raised):
    def fail(step):
        if step == 3:
            raise error("no such record")

    batches = numbers(0, num_workers, act=fail)
    workers = processes(batches) if num_workers else []
    for step in range(3):
        assert_is(next(batches), step)
    with pytest.raises(raised, match="no such record"):
        next(batches)
    assert all(worker.returncode is not None for worker in workers)
    with pytest.raises(StopIteration):
        next(batches)


def test_a_source_that_does_not_pickle_starts_no_worker():
    open_files, lock = os.listdir("/proc/self/fd"), threading.Lock()
    with pytest.raises(TypeError, match="pickle"):
        numbers(0, num_workers=1, act=lambda step: lock)
    assert os.listdir("/proc/self/fd") == open_files


# The life of workers, seen from another process.

SCRIPT = """
import signal, sys, time
from deeplab_jax import data
from deeplab_jax.config import DataConfig
from deeplab_jax.data import pipeline

def main(end):
    # A shell's background jobs inherit that SIGINT is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config = DataConfig(name="shapes", crop_size=(32,), num_workers=2)
    dataset = data.load(config, "train")
    batches = pipeline.train_batches(dataset, config, batch_size=2, seed=0, start_step=0)
    for _ in range(0 if end == "start" else 3):
        next(batches)
    if end == "raise":
        raise RuntimeError("the consumer failed")
    if end == "wait":
        stopped = []
        signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
        print("ready", flush=True)
        while not stopped:
            time.sleep(0.05)
        for _ in range(10):
            next(batches)
    if end == "sleep":
        print("ready", flush=True)
        time.sleep(60)
    if end != "open":
        batches.close()
    print("done", flush=True)

main(sys.argv[1])  # without a guard: workers do not import this file
"""


@pytest.fixture
def start(tmp_path):
    """Starts the script in a process group of its own; what is left of the group ends with it."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    processes = []

    def run(end):
        process = subprocess.Popen(
            [sys.executable, str(script), end],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": str(pathlib.Path(data.__file__).parents[2])},
        )
        processes.append(process)
        return process

    yield run
    for process in processes:
        if group(process):
            os.killpg(process.pid, signal.SIGKILL)


def group(process):
    """Ids of the processes in its group that live."""
    ids = []
    for folder in pathlib.Path("/proc").iterdir():
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
        except (OSError, IndexError):  # not a process, or one that has just ended
            continue
        if folder.name.isdigit() and int(fields[2]) == process.pid and fields[0] != "Z":
            ids.append(int(folder.name))
    return ids


def wait_until_empty(process, seconds=20):
    deadline = time.monotonic() + seconds
    while group(process):
        assert time.monotonic() < deadline, f"processes left: {group(process)}"
        time.sleep(0.05)


@pytest.mark.parametrize("end", ["start", "open"])
def test_the_end_of_the_program_ends_the_workers(start, end):
    process = start(end)
    out, err = process.communicate(timeout=40)
    assert (process.returncode, out, err) == (0, "done\n", "")
    wait_until_empty(process)


def test_an_error_of_the_consumer_ends_the_workers(start):
    process = start("raise")
    _, err = process.communicate(timeout=40)
    assert process.returncode == 1
    assert err.count("Traceback") == 1
    assert err.endswith("RuntimeError: the consumer failed\n")
    wait_until_empty(process)


def test_sigterm_to_all_leaves_the_workers_at_work(start):
    process = start("wait")
    assert process.stdout.readline() == "ready\n"
    assert len(group(process)) >= 3
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=40)
    assert (process.returncode, out, err) == (0, "done\n", "")
    wait_until_empty(process)


def test_control_c_gives_one_traceback(start):
    process = start("sleep")
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=40)
    assert process.returncode == -signal.SIGINT
    assert err.count("Traceback") == 1
    assert err.endswith("KeyboardInterrupt\n")
    wait_until_empty(process)


def test_workers_end_when_their_process_is_killed(start):
    process = start("sleep")
    assert process.stdout.readline() == "ready\n"
    process.kill()
    process.wait()
    wait_until_empty(process)
