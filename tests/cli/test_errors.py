"""How a command ends."""

import signal
import subprocess
import sys

import pytest

import deeplab_jax

COMPILING = """
import signal, sys, time
from deeplab_jax.cli.errors import exit_on_user_error
from deeplab_jax.inference.compilation import Programs
from deeplab_jax.utils.errors import UserError

class Slow:
    def lower(self):
        print("compiles")
        time.sleep(60)

programs = Programs({"f": Slow()})
with exit_on_user_error():
    programs.prepare("f")
    time.sleep(0.2)
    raise %s
"""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        ("UserError('wrong')", 2, "error: wrong\n"),
        ("SystemExit(130)", 130, ""),
        ("SystemExit", 0, ""),
    ],
)
def test_the_end_does_not_wait_for_a_program_that_is_compiled(error, code, message):
    done = subprocess.run(
        [sys.executable, "-c", COMPILING % error], capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, "compiles\n", message)


COLLECTING = """
import gc, os, signal, sys, time
from deeplab_jax.cli.errors import exit_on_sigterm, exit_on_user_error

def send(phase, info):
    if phase == "stop":
        os.kill(os.getpid(), int(sys.argv[1]))

signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
with exit_on_user_error(), exit_on_sigterm():
    gc.callbacks.append(send)
    gc.collect(0)
    gc.callbacks.clear()
    time.sleep(20)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, -2), (signal.SIGTERM, 143)])
def test_a_signal_during_a_garbage_collection_is_not_lost(number, code):
    arguments = [sys.executable, "-c", COLLECTING, str(int(number))]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=15)
    assert done.returncode == code
    assert done.stderr == ("error: interrupted\n" if code == -2 else "")


def test_version(command):
    code, out, err = command("--version")
    assert (code, out, err) == (0, f"deeplab-jax {deeplab_jax.__version__}\n", "")
