"""How programs are compiled, and where they are kept."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from deeplab_jax.models.functional import FunctionalModel
from deeplab_jax.models.ops.atrous_conv import atrous_conv
from deeplab_jax.models.ops.convolution import ONEDNN

# XLA:CPU's calls of oneDNN, each a convolution with its bias, the residual sum and relu. YNNPACK,
# which would come first, keeps the sums over maps. Older versions know these options, to no effect.
ONEDNN_OPTIONS: dict[str, Any] = {
    "xla_cpu_experimental_onednn_custom_call": True,
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
}


def jit_inference(function: Callable[..., Any], model: FunctionalModel, **options: Any) -> Any:
    """Jits `function(model, ...)` as it is fastest on the default device without gradients.

    On CPUs where XLA has oneDNN convolutions are left to it. A ResNet's forward pass then takes 0.8
    to 0.9 of the time of `atrous_conv`'s own choice and less than half of the memory beside
    variables and images, and compiles in a quarter of the time. Depthwise convolutions are not left
    to it: in bfloat16 MobileNetV3 would take five times as long.

    Args:
      function: of a model and arrays.
      model: the first argument, which is replaced by one for this device.
      options: of `jax.jit`.
    """
    # A program with calls of oneDNN says in these words that it cannot be kept on disk.
    unkept = "Error writing persistent compilation cache entry .*bad_alloc"
    warnings.filterwarnings("ignore", unkept, UserWarning)
    if jax.default_backend() == "cpu" and has_onednn():
        model = model.using(ONEDNN)
        options["compiler_options"] = ONEDNN_OPTIONS
    return jax.jit(functools.partial(function, model), **options)


@functools.cache
def has_onednn() -> bool:
    """Whether XLA on this machine's CPU calls oneDNN if asked to; tried with a small program."""
    x, kernel = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 4, 4, 8), (1, 1, 8, 8)))
    native = functools.partial(atrous_conv, method="native")
    lowered = jax.jit(native).lower(x, kernel)
    try:
        return "__onednn$convolution" in str(
            lowered.compile(compiler_options=ONEDNN_OPTIONS).as_text()
        )
    except jax.errors.JaxRuntimeError:  # a version without these options
        return False


def use_compilation_cache() -> None:
    """Keeps compiled programs on disk, so that a second start of the same program is quick."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(home, "deeplab_jax", "xla"))
