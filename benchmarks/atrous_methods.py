"""Times each implementation of the atrous convolution, and PyTorch's, on this device.

    python benchmarks/atrous_methods.py                    # the convolutions of training
    python benchmarks/atrous_methods.py --dtype float32    # bfloat16 is the default on GPU

Each number is in milliseconds, forward / both gradients: the best of three means over ten
executions.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from deeplab_jax.models.ops.atrous_conv import METHODS, atrous_conv

# Number of images, side of the map, input and output channels, rate of a 3x3 kernel.
SHAPES = {
    "gpu": (
        (16, 33, 256, 256, 1),
        (16, 33, 512, 512, 2),
        (16, 33, 2048, 256, 6),
        (16, 33, 2048, 256, 12),
        (16, 33, 2048, 256, 18),
        (32, 65, 256, 256, 2),
        (32, 65, 512, 512, 4),
        (32, 65, 2048, 256, 12),
        (32, 65, 2048, 256, 24),
        (32, 65, 2048, 256, 36),
    ),
    "cpu": (
        (2, 33, 256, 256, 2),
        (2, 33, 512, 512, 2),
        (4, 33, 512, 512, 4),
        (1, 65, 512, 512, 8),
        (1, 65, 128, 128, 12),
        (1, 65, 256, 256, 12),
        (2, 33, 2048, 256, 12),
        (1, 65, 2048, 256, 12),
        (1, 65, 2048, 256, 24),
        (1, 65, 2048, 256, 36),
    ),
}


def best(run: Callable[[], Any], wait: Callable[[Any], Any]) -> float:
    """Returns the milliseconds of one execution."""
    wait(run())
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        for _ in range(10):
            result = run()
        wait(result)
        times.append((time.perf_counter() - begun) / 10)
    return 1e3 * min(times)


def ours(shape: tuple[int, ...], dtype: str, method: str | None) -> tuple[float, float]:
    n, side, c_in, c_out, rate = shape
    x = jax.random.normal(jax.random.key(0), (n, side, side, c_in), dtype)
    kernel = jax.random.normal(jax.random.key(1), (3, 3, c_in, c_out), dtype)
    conv = functools.partial(atrous_conv, kernel_dilation=rate, method=method)
    forward = jax.jit(conv)
    backward = jax.jit(lambda x, kernel, y: jax.vjp(conv, x, kernel)[1](y))
    y = forward(x, kernel)
    wait = jax.block_until_ready
    return best(lambda: forward(x, kernel), wait), best(lambda: backward(x, kernel, y), wait)


def theirs(shape: tuple[int, ...], dtype: str) -> tuple[float, float]:
    import torch

    n, side, c_in, c_out, rate = shape
    torch.backends.cudnn.benchmark = True
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {"device": device, "dtype": getattr(torch, dtype)}
    layout = torch.channels_last
    x = torch.randn(n, c_in, side, side, **options).contiguous(memory_format=layout)
    kernel = torch.randn(c_out, c_in, 3, 3, **options).contiguous(memory_format=layout)
    x, kernel = x.requires_grad_(), kernel.requires_grad_()

    def wait(_: Any) -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def forward() -> Any:
        return torch.nn.functional.conv2d(x, kernel, padding=rate, dilation=rate)

    y = forward()
    cotangent = torch.randn_like(y)
    return best(forward, wait), best(
        lambda: torch.autograd.grad(y, (x, kernel), cotangent, retain_graph=True), wait
    )


def main() -> int:
    platform = jax.default_backend()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dtype",
        default="bfloat16" if platform == "gpu" else "float32",
        choices=("bfloat16", "float32"),
    )
    dtype = parser.parse_args().dtype
    methods: dict[str, str | None] = {name: name for name in METHODS} | {"chosen": None}
    if platform == "cpu":
        del methods["phases"]  # takes seconds: XLA:CPU is slow for many small maps
    with_torch = importlib.util.find_spec("torch") is not None
    table = Table("maps, channels, rate", *methods, *(["PyTorch"] if with_torch else []), box=None)
    log = Console(stderr=True)
    for shape in SHAPES["gpu" if platform == "gpu" else "cpu"]:
        n, side, c_in, c_out, rate = shape
        name = f"{n}x{side}x{side}, {c_in} -> {c_out}, rate {rate}"
        log.print(name)
        cells = [ours(shape, dtype, method) for method in methods.values()]
        if with_torch:
            cells.append(theirs(shape, dtype))
        table.add_row(name, *(f"{forward:.2f} / {both:.2f}" for forward, both in cells))
    device = jax.devices()[0].device_kind
    table.title = f"{device}, {dtype}: ms, forward / both gradients"
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
