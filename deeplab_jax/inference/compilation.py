"""Compiles inference, and keeps compiled programs on disk."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deeplab_jax.models.functional import FunctionalModel, Variables
from deeplab_jax.models.ops.atrous_conv import atrous_conv
from deeplab_jax.models.ops.convolution import ONEDNN
from deeplab_jax.utils.paths import user_cache
from deeplab_jax.utils.progress import in_thread

# Let XLA:CPU call oneDNN for each convolution with its bias, residual sum and relu. YNNPACK, which
# has precedence, keeps only sums over maps. Older versions accept these options without effect.
ONEDNN_OPTIONS: dict[str, Any] = {
    "xla_cpu_experimental_onednn_custom_call": True,
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
}

# XLA compiles and times about 70 candidates for each convolution. Compilation takes half of the
# time without the schedule that overlaps communication, of which one device has none, and without
# Triton's candidates for products of matrices.
GPU_OPTIONS: dict[str, Any] = {
    "xla_gpu_enable_latency_hiding_scheduler": False,
    "xla_gpu_enable_triton_gemm": False,
}
# XLA times candidates on the GPU. Two programs that do so at once disturb each other; with
# jax 0.11.2 three of them did not end.
_TIMING = threading.Lock()
STARTED = weakref.WeakSet[concurrent.futures.Future]()  # programs that threads compile, or compiled


def jit_inference(function: Callable[..., Any], model: FunctionalModel, **options: Any) -> Any:
    """Jits `function(model, ...)` with the fastest convolutions for inference on this device.

    On CPUs, oneDNN computes the convolutions if XLA can call it. Compared with the methods that
    `atrous_conv` chooses, a ResNet's forward pass takes 0.8 to 0.9 of the time, less than half of
    the memory in addition to variables and images, and compiles in a quarter of the time. Depthwise
    convolutions do not use oneDNN: MobileNetV3 in bfloat16 would take five times as long.
    """
    # Programs that call oneDNN cannot be written to the cache, and warn of it in these words.
    uncached = "Error writing persistent compilation cache entry .*bad_alloc"
    warnings.filterwarnings("ignore", uncached, UserWarning)
    if jax.default_backend() == "cpu" and has_onednn():
        model = model.using(ONEDNN)
        options["compiler_options"] = ONEDNN_OPTIONS
    elif jax.default_backend() == "gpu":
        options["compiler_options"] = GPU_OPTIONS
    return jax.jit(functools.partial(function, model), **options)


@functools.cache
def has_onednn() -> bool:
    """Returns whether XLA calls oneDNN on this CPU, by compiling a small convolution."""
    x, kernel = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 4, 4, 8), (1, 1, 8, 8)))
    native = functools.partial(atrous_conv, method="native")
    lowered = jax.jit(native).lower(x, kernel)
    try:
        compiled = lowered.compile(compiler_options=ONEDNN_OPTIONS)
    except jax.errors.JaxRuntimeError:  # a version without these options
        return False
    return "__onednn$convolution" in str(compiled.as_text())


def use_compilation_cache() -> None:
    """Caches compiled programs in the user's cache folder, unless JAX's cache is set already."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(user_cache() / "deeplab_jax" / "xla"))


def compile_lowered(lowered: Any) -> Any:
    """Compiles what `jax.jit(...).lower` returned; on GPU, one program at a time."""
    with _TIMING if jax.default_backend() == "gpu" else contextlib.nullcontext():
        return lowered.compile()


def compile_in_thread(lowered: Any) -> concurrent.futures.Future[Any]:
    """Starts `compile_lowered` in a thread."""
    program = in_thread(compile_lowered, lowered, name="compile")
    STARTED.add(program)
    return program


class Programs:
    """The compiled programs of jitted functions, one for each function and shapes of arguments.

    Programs that `prepare` announces are compiled in threads, several at the same time. A call
    waits for its program or, if nothing compiles it, compiles it in its own thread, where JAX's
    settings by context, such as `jax.enable_x64`, hold.
    """

    def __init__(self, functions: Mapping[str, Any]) -> None:
        """Takes jitted functions by name; compiles nothing yet."""
        self._functions = functions
        self._programs: dict[tuple[Any, ...], concurrent.futures.Future[Any]] = {}
        self._lock = threading.Lock()
        self._pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count(), "compile")
        # Otherwise, the end of Python would wait for programs that nothing has begun to compile.
        weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)

    def __len__(self) -> int:
        """Number of programs that are compiled or being compiled."""
        return len(self._programs)

    def prepare(self, function: str, *arguments: Any) -> None:
        """Compiles a program in a thread, unless it was started before.

        The arguments are arrays or their shapes; all `Variables` have the same shapes.
        """
        program, is_new = self._find(function, arguments)
        if is_new:
            STARTED.add(program)
            self._pool.submit(self._compile, program, function, arguments)

    def __call__(self, function: str, *arguments: Any) -> Any:
        """Calls a function on arrays; raises what compiling it raised."""
        program, is_new = self._find(function, arguments)
        if is_new:
            self._compile(program, function, arguments)
        return program.result()(*arguments)

    def cancel(self) -> None:
        """Forgets the programs that nothing has begun to compile."""
        with self._lock:
            for key, program in list(self._programs.items()):
                if program.cancel():
                    del self._programs[key]

    def _find(
        self, function: str, arguments: tuple[Any, ...]
    ) -> tuple[concurrent.futures.Future[Any], bool]:
        """Returns the program, which may not be compiled yet, and whether nothing compiles it."""
        leaves, structure = jax.tree.flatten([x for x in arguments if not isinstance(x, Variables)])
        key = (function, structure, *map(np.shape, leaves))
        with self._lock:
            is_new = key not in self._programs
            return self._programs.setdefault(key, concurrent.futures.Future()), is_new

    def _compile(
        self, program: concurrent.futures.Future[Any], function: str, arguments: tuple[Any, ...]
    ) -> None:
        if not program.set_running_or_notify_cancel():
            return
        try:
            program.set_result(compile_lowered(self._functions[function].lower(*arguments)))
        except BaseException as error:
            program.set_exception(error)
