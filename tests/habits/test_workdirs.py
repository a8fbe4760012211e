"""Two runs in one workdir."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import textwrap
from unittest import mock

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
        held = (tmp_path / "run" / ".lock").read_text()
        assert held == f"process {os.getpid()} on host {socket.gethostname()}"
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_run_that_fails_leaves_no_folder(tmp_path):
    config = tiny.get_config()
    config.data.split = "none"
    with pytest.raises(UserError, match="none"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_without_locks_a_running_process_of_this_host_is_noticed(tmp_path, monkeypatch):
    no_locks = mock.Mock(side_effect=OSError(errno.ENOLCK, "No locks available"))
    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        (tmp_path / ".lock").write_text(f"process {process.pid} on host {socket.gethostname()}")
        with pytest.raises(UserError, match=f"process {process.pid}"), lock_workdir(tmp_path):
            pass
        process.kill()


def test_without_locks_there_is_a_warning_with_the_last_run(tmp_path, monkeypatch, capsys):
    def lockf(file, flags):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    (tmp_path / ".lock").write_text("process 5 on host x")
    with lock_workdir(tmp_path):
        pass
    said = capsys.readouterr().err
    assert "file system without locks (No locks available)" in said
    assert "the last one was process 5 on host x" in said
