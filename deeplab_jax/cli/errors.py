"""Reports a user's mistake as one message, with exit code 2, and keeps printing from failing."""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from deeplab_jax.utils.errors import UserError, first_line

# What the system says about a path of the user's, even to a mere question such as `exists`.
_PATH_ERRORS = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS)


def escape_unprintable() -> None:
    """Makes stdout escape what its encoding lacks, such as a file name that is not UTF-8."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Ends the program without a traceback if the body raises a `UserError`, is interrupted, fills
    the disk, may not use a path, or finds no platform that JAX_PLATFORMS names.

    A program that ends so, or by SystemExit, does not wait for threads that compile. Ctrl-C ends
    the body at any time, also during a garbage collection.
    """
    hook, sys.unraisablehook = sys.unraisablehook, _repeat_interrupt
    code = 2
    try:
        yield
        return
    except SystemExit as end:
        _exit_at_once(end.code)
        raise
    except KeyboardInterrupt:  # also a second one, while a command ends
        print("error: interrupted", file=sys.stderr)
        _finish_writing()
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # so that a shell ends its loop, too
        signal.raise_signal(signal.SIGINT)
    except UserError as error:
        outputs: Any = sys.modules.get("deeplab_jax.buckets.outputs")
        message = outputs.shown(str(error)) if outputs else str(error)
        code = error.exit_code
    except OSError as error:
        if error.errno in _PATH_ERRORS and error.filename:
            message = f"{error.filename}: {error.strerror}"
        elif error.errno == errno.ENOSPC:
            file = error.filename or "while writing"
            message = f"the disk is full ({file}); free some space and run the command again"
        else:
            raise
    except (RuntimeError, AssertionError):
        message = _platform_problem()
        if not message:
            raise
    finally:
        sys.unraisablehook = hook
    print(f"error: {message}", file=sys.stderr)
    _exit_at_once(code)
    sys.exit(code)


def _exit_at_once(code: Any) -> None:
    """Ends the process at once after a signal, and if a thread compiles, which Python waits for.

    JAX may crash if Python ends while a device computes.
    """
    compilation: Any = sys.modules.get("deeplab_jax.inference.compilation")
    is_compiling = any(program.running() for program in getattr(compilation, "STARTED", ()))
    if isinstance(code, str) or not (is_compiling or (code or 0) > 128):
        return
    _finish_writing()
    os._exit(code or 0)


def _finish_writing() -> None:
    for thread in threading.enumerate():
        if thread.name.startswith("images"):  # may still write, after a second Ctrl-C
            thread.join(timeout=5)
    sys.stdout.flush()


def _repeat_interrupt(ignored: sys.UnraisableHookArgs) -> None:
    """Sends a signal again whose exception Python ignores: in garbage collections, finalizers."""
    numbers = {KeyboardInterrupt: signal.SIGINT, SystemExit: signal.SIGTERM}
    if (number := numbers.get(ignored.exc_type)) is None:
        sys.__unraisablehook__(ignored)
    else:
        main = threading.main_thread().ident
        threading.Timer(0.01, signal.pthread_kill, (main, number)).start()


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Raises SystemExit in the body at the signal SIGTERM, so that it cleans up as at Ctrl-C."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _platform_problem() -> str:
    """Returns what is wrong with JAX_PLATFORMS; an empty text if JAX can use what it names."""
    jax: Any = sys.modules.get("jax")
    if jax is None or not (chosen := jax.config.jax_platforms):
        return ""
    try:
        jax.devices()
        return ""
    except AssertionError:  # raised for "cuda" without its plugin, and has no text
        reason = ""
    except RuntimeError as error:
        reason = f" ({first_line(error)})"
    jax.config.update("jax_platforms", "")
    jax.devices()
    available = importlib.import_module("jax.extend.backend").backends()
    return (
        f"JAX_PLATFORMS={chosen} cannot be used here{reason}. Platforms that JAX can use here: "
        f"{', '.join(available)}. Set JAX_PLATFORMS to one of them, or unset it. To use an NVIDIA "
        "GPU, pip install 'deeplab-jax[cuda]'; to use a TPU, pip install 'deeplab-jax[tpu]'"
    )
