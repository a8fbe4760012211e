"""Runs whose workdir is in a bucket: whole, killed, cut off from the bucket, by two processes."""

import hashlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

import tiny
from bucket_kills import end_state, kill_and_resume, problems
from deeplab_jax.buckets.checkpoints import checkpoint_of, marker
from deeplab_jax.buckets.run import BucketRun
from deeplab_jax.buckets.store import Store
from deeplab_jax.training import receipt
from deeplab_jax.training.train import FIRST_STAGE, train
from deeplab_jax.utils.errors import UserError
from tiny import finish, start_command

STEPS = ("--config.train.log_every=1",)


def read_until(process, text):
    """Reads what a command says until a text comes; returns all of it."""
    said = ""
    while text not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    return said


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A local run."""
    workdir = tmp_path_factory.mktemp("unbroken")
    finish(start_command(workdir, *STEPS))
    return workdir


def test_a_run_in_a_bucket_is_a_local_run(gs_bucket, unbroken, tmp_path):
    address = f"{gs_bucket}/runs/a"
    out, _ = finish(start_command(f"{address}/", *STEPS))
    assert problems(address, unbroken, tmp_path / "end") == []
    names = list(Store(address).list())
    local = [path for path in unbroken.rglob("*") if path.is_file() and path.name != ".lock"]
    in_bucket = {name for name in names if not name.startswith((".lease/", "tensorboard/"))}
    expected = {path.relative_to(unbroken).as_posix() for path in local}
    markers = {f"checkpoints/{step}/commit_success.txt" for step in (2, 4, 6, 8)}
    data = {name for name in in_bucket | expected if "/d/" in name}  # named by a hash
    steps = {name.split("/")[1] for name in expected if name.startswith("checkpoints/")}
    assert {name.split("/")[1] for name in in_bucket if name.startswith("checkpoints/")} == steps
    in_bucket, expected = in_bucket - data - markers, expected - data - markers
    assert in_bucket == {name for name in expected if not name.startswith("tensorboard/")}
    assert any(name.startswith("tensorboard/events") for name in names)
    assert f"predictions: {address}/pictures/predictions_000008.png" in out
    assert not any((tmp_path / "cache" / "deeplab_jax" / "runs").rglob("config.json"))
    # It is done, and says so again.
    again, _ = finish(start_command(address, *STEPS))
    assert again == out
    read, local = receipt.read(receipt.local_run(address)), receipt.read(unbroken)
    assert read.steps == local.steps
    before = Store(address).list()
    command = [sys.executable, "-m", "deeplab_jax.cli", "replay", address, "--steps=6:8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert "from checkpoint 6\nsteps 7 to 8 equal bit for bit" in done.stdout, done.stderr
    assert Store(address).list() == before
    config = tiny.get_config()
    config.seed = 1
    with pytest.raises(UserError, match=rf"{address} holds a run with another config(.|\n)*seed"):
        train(config, address)


@pytest.mark.parametrize("server", ["s3"], indirect=True)
def test_a_run_killed_repeatedly_ends_as_if_never_killed(server, bucket, unbroken, tmp_path):
    address = f"{bucket}/run"
    kill_and_resume(address, tmp_path / "cache", 2, seed=1, flags=STEPS)
    assert problems(address, unbroken, tmp_path / "end") == []


def test_the_second_of_two_commands_is_refused_by_name(gs_bucket, unbroken):
    first = start_command(f"{gs_bucket}/run", "--config.train.steps=1000000")
    read_until(first, "step 2/")
    _, err = start_command(f"{gs_bucket}/run").communicate(timeout=60)
    first.send_signal(signal.SIGTERM)
    finish(first)
    assert f"{gs_bucket}/run is in use by process {first.pid} on host {socket.gethostname()}" in err


@pytest.mark.parametrize("own_server", ["gs"], indirect=True)
def test_the_run_goes_on_without_the_bucket_for_a_while(own_server, unbroken, tmp_path):
    address = f"{own_server.make_bucket()}/run"
    process = start_command(address, *STEPS)
    read_until(process, "step 2/")  # a save begins
    own_server.freeze()
    read_until(process, "step 8/")
    time.sleep(3)
    own_server.thaw()
    finish(process)
    assert problems(address, unbroken, tmp_path / "end") == []


def test_without_the_bucket_for_good_the_local_copy_is_named(own_server, unbroken, tmp_path):
    address = f"{own_server.make_bucket()}/run"
    flags = (*STEPS, "--config.train.steps=100000")
    process = start_command(address, *flags, "--bucket_timeout=3")
    read_until(process, "step 4/")
    own_server.kill()
    _, err = process.communicate(timeout=200)
    assert process.returncode == 1, err
    copy = BucketRun(address, process=0, patience=5, log=print).path
    newest = max(int(path.name) for path in (copy / "checkpoints").iterdir())
    assert f"{copy}/checkpoints/{newest}" in err
    assert "Traceback" not in err
    assert newest > 4
    if own_server.scheme == "s3":  # moto forgets its buckets
        return
    own_server.start()
    process = start_command(address, *flags)
    assert f"from step {newest:,}" in read_until(process, "\nstep ")
    process.send_signal(signal.SIGTERM)
    finish(process)
    metrics = end_state(address, tmp_path / "end")[1]
    steps = [entry["step"] for entry in metrics if "loss" in entry]
    assert steps == list(range(1, len(steps) + 1))


def test_two_processes_run_in_one_bucket(gs_bucket, tmp_path):
    address = f"{gs_bucket}/run"
    # At a learning rate of 0.05 rounding becomes visible.
    flags = (*STEPS, "--config.optimizer.learning_rate=0.001", "--config.mesh.data=-1")
    flags = (*flags, "--config.mesh.fully_sharded=true", "--config.train.eval_every=0")
    finish(start_command(tmp_path / "one", *flags))
    process = start_command(address, *flags)
    read_until(process, "step 5/")
    process.kill()
    process.communicate()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = (*flags, f"--coordinator=localhost:{port}", "--num_processes=2")
    both = [start_command(address, *flags, f"--process_id={n}") for n in range(2)]
    said = [finish(process)[1] for process in both]
    assert "from step" in said[0]
    state, metrics = end_state(address, tmp_path / "end")
    assert [entry["step"] for entry in metrics if "loss" in entry] == list(range(1, 9))
    for name, value in tiny.saved_state(tmp_path / "one").items():
        np.testing.assert_allclose(state[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("own_server", ["gs"], indirect=True)
def test_processes_that_see_other_checkpoints_are_refused(own_server, gs_bucket, monkeypatch):
    store = Store(f"{gs_bucket}/run")
    sums = 2, hashlib.sha256(b"{}").hexdigest()
    store.write("checkpoints/2/info/data.json", b"{}")
    store.write("checkpoints/2/commit_success.txt", marker({"info/data.json": sums}))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        flags = (f"--coordinator=localhost:{free.getsockname()[1]}", "--num_processes=2")
    first = start_command(store.url, *flags, "--process_id=0")
    own_server.make_bucket(store.bucket)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", own_server.url)
    second = start_command(store.url, *flags, "--process_id=1")
    for process in (first, second):
        _, err = process.communicate(timeout=100)
        assert process.returncode == 2, err
        assert f'the copy of {store.url}: ["2"] on process 0' in err


def test_two_stages_run_in_one_bucket(gs_bucket, tmp_path):
    stages = ("--config.train.steps=2", "--config.second_stage.steps=2", *STEPS)
    finish(start_command(tmp_path / "local", *stages))
    finish(start_command(f"{gs_bucket}/run", *stages))
    assert problems(f"{gs_bucket}/run", tmp_path / "local", tmp_path / "end") == []
    config = json.loads((tmp_path / "end" / "config.json").read_text())
    assert config["init"]["path"] == "stage1/checkpoints/2"
    assert checkpoint_of(f"{FIRST_STAGE}/checkpoints/2/x") == f"{FIRST_STAGE}/checkpoints/2"


def test_other_versions_are_noticed_in_a_bucket(gs_bucket, capfd, monkeypatch):
    config = tiny.get_config()
    config.train.steps, config.train.eval_every = 4, 0
    train(config, f"{gs_bucket}/run")
    store = Store(f"{gs_bucket}/run")
    store.delete(["checkpoints/4/commit_success.txt"])  # as if it was killed while it saved
    monkeypatch.setattr("cv2.__version__", "4.13.0")
    config.train.strict_resume = True
    with pytest.raises(UserError, match=r"those of checkpoint 2:\n  opencv: "):
        train(config, f"{gs_bucket}/run")
    config.train.strict_resume = False
    assert train(config, f"{gs_bucket}/run").step == 4
    assert "-> 4.13.0 (" in capfd.readouterr().err


@pytest.mark.parametrize("complete", [True, False])
def test_the_local_copy_of_a_killed_run_is_used_if_it_was_complete(gs_bucket, complete, tmp_path):
    code = (
        "import os, sys; from deeplab_jax.buckets.run import BucketRun\n"
        "held = BucketRun(sys.argv[1], process=0, patience=5, log=print)\n"
        "with held.hold():\n"
        "    (held.path / 'config.json').write_text('{}'); held.flush()\n"
        "    (held.path / 'config.json').write_text('{ }'); os._exit(1)\n"
    )
    subprocess.run([sys.executable, "-c", code, f"{gs_bucket}/run"], check=False, timeout=60)
    held = BucketRun(f"{gs_bucket}/run", process=0, patience=5, log=print)
    (held.path / "half").touch()
    if not complete:
        (held.path / ".complete").unlink()
    with held.hold():
        assert (held.path / "config.json").read_text() == ("{ }" if complete else "{}")
        assert (held.path / "half").exists() == complete
    assert not held.path.exists()


def test_checkpoints_without_marks_are_refused_and_kept(bucket):
    run = Store(f"{bucket}/run")
    run.write("checkpoints/4/model/a", b"precious")
    held = BucketRun(run.url, process=0, patience=5, log=print)
    for _ in range(2):  # again, when the first has left its traces
        with pytest.raises(UserError, match=r"without commit_success\.txt"), held.hold():
            pass
    assert run.read("checkpoints/4/model/a") == b"precious"


def hold(address):
    return BucketRun(address, process=0, patience=5, log=lambda line: None)


def test_a_refused_command_leaves_the_local_copy_complete(gs_bucket):
    code = (
        "import os, sys; from deeplab_jax.buckets.run import BucketRun\n"
        "held = BucketRun(sys.argv[1], process=0, patience=5, log=len)\n"
        "with held.hold():\n"
        "    held.flush(); print('held', flush=True); sys.stdin.read()\n"
        "    (held.path / 'config.json').write_text('{}'); os._exit(1)\n"
    )
    command = [sys.executable, "-c", code, f"{gs_bucket}/run"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as first:
        assert first.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="in use by process"), hold(f"{gs_bucket}/run").hold():
            pass
        first.stdin.close()
    again = hold(f"{gs_bucket}/run")
    with again.hold():
        assert (again.path / "config.json").exists()


def test_a_copy_whose_deletion_was_killed_is_not_used(gs_bucket, monkeypatch):
    first, rmtree = hold(f"{gs_bucket}/run"), shutil.rmtree

    def begin(folder, **_):
        (folder / "config.json").unlink(missing_ok=True)
        raise KeyboardInterrupt

    def run():
        with first.hold():
            (first.path / "config.json").write_text("{}")
            monkeypatch.setattr(shutil, "rmtree", begin)

    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    again = hold(f"{gs_bucket}/run")
    with again.hold():
        assert (again.path / "config.json").read_text() == "{}"


def test_runs_in_folders_of_another_run_are_left_alone(gs_bucket):
    """One run at `exp`, another at `exp/b`, in the middle of its first checkpoint."""
    inner, outer = hold(f"{gs_bucket}/exp/b"), hold(f"{gs_bucket}/exp")
    unmarked = Store(inner.address)
    with inner.hold():
        (inner.path / "config.json").write_text("inner")
        inner.flush()
        unmarked.write("checkpoints/4/model/a", b"precious")
        with outer.hold():
            assert not list(outer.path.glob("b/*"))
            (outer.path / "config.json").write_text("outer")
        assert (inner.path / "config.json").read_text() == "inner"
        assert unmarked.read("checkpoints/4/model/a") == b"precious"
    assert Store(outer.address).read("config.json") == b"outer"


@pytest.mark.usefixtures("impatient")
def test_an_outage_at_the_start_is_no_traceback(own_server):
    held = hold(f"{own_server.make_bucket()}/run")
    own_server.kill()
    with pytest.raises(UserError) as raised, held.hold():
        pass
    assert raised.value.exit_code == 1
    assert not held.exists(held.path / "pictures" / "a.png")
