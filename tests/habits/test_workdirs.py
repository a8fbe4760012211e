"""Two runs in one workdir."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap

import pytest

import tiny
from deeplab_jax.config import SecondStageConfig
from deeplab_jax.training.train import train
from deeplab_jax.training.workdir import lock_workdir
from deeplab_jax.utils.errors import UserError


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of `tmp_path / "run"`."""
    code = f"""
        import pathlib, time
        from deeplab_jax.training.workdir import lock_workdir
        with lock_workdir(pathlib.Path({str(tmp_path / "run")!r})):
            print("locked", flush=True)
            time.sleep(600)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_a_second_run_is_refused_with_the_owner_of_the_workdir(tmp_path, holder):
    message = f"in use by process {holder.pid} on host {socket.gethostname()}"
    with pytest.raises(UserError, match=message):
        train(tiny.get_config(), tmp_path / "run")
    assert os.listdir(tmp_path / "run") == [".lock"]


@pytest.mark.parametrize("name", ["run", "link"])
def test_another_run_of_the_same_process_is_refused(tmp_path, name):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with lock_workdir(tmp_path / "run"):
        with pytest.raises(UserError, match=f"another run of this process {os.getpid()}"):
            train(tiny.get_config(), tmp_path / name)
        assert os.listdir(tmp_path / "run") == [".lock"]
    with lock_workdir(tmp_path / "run"):  # it is free again
        pass


def test_the_folder_of_the_first_stage_is_locked_too(tmp_path):
    config = tiny.get_config()
    config.second_stage = SecondStageConfig(steps=2)
    stage = tmp_path / "run" / "stage1"
    with lock_workdir(stage), pytest.raises(UserError, match="stage1 is in use"):
        train(config, tmp_path / "run")


def test_a_killed_run_holds_nothing(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / ".lock").exists()
    with lock_workdir(tmp_path / "run"):
        held = json.loads((tmp_path / "run" / ".lock").read_text())
        assert held["pid"] == os.getpid()
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_run_that_fails_leaves_no_folder(tmp_path):
    config = tiny.get_config()
    config.data.split = "none"
    with pytest.raises(UserError, match="none"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def without_locks(monkeypatch):
    def lockf(file, flags):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)


def test_without_locks_a_running_process_of_this_host_is_noticed(tmp_path, without_locks):
    folder = tmp_path / "run"
    folder.mkdir()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        holder = {"pid": process.pid, "host": socket.gethostname()}
        (folder / ".lock").write_text(json.dumps(holder))
        with pytest.raises(UserError, match=f"process {process.pid}"), lock_workdir(folder):
            pass
        process.kill()


@pytest.mark.parametrize("text", ["", "{", '{"pid": 999999999, "host": "another"}'])
def test_without_locks_there_is_a_warning(tmp_path, without_locks, capsys, text):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".lock").write_text(text)
    with lock_workdir(folder):
        pass
    assert "file system without locks" in capsys.readouterr().err
