"""Measures both packages alternately, so that noise of the machine affects both."""

from __future__ import annotations

import dataclasses
import gc
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from . import ours, theirs
from .cases import Built, Case

_SECONDS_A_TURN = 0.5  # shortest run of one package before the other one runs
_MATMUL_SIDE = {"cpu": 2048, "gpu": 8192}
_COPIED_BYTES = {"cpu": 2**28, "gpu": 2**31}
PACKAGES = ("flax", "jax", "jaxlib", "torch", "torchvision")


@dataclasses.dataclass(frozen=True)
class Row:
    """Results of both packages for a case; seconds are medians per execution over the turns.

    Attributes:
      name: of the case.
      ours_seconds, theirs_seconds: of this package and of torchvision in its best mode.
      theirs: name of that mode.
      ratio: theirs divided by ours, median over the turns; above 1 this package is faster.
      ratio_low, ratio_high: smallest and largest over the turns.
      theirs_by_mode: seconds of each mode.
      ours_bytes, theirs_bytes: peak memory on the device, None if it is not known.
      ours_compile_seconds, theirs_compile_seconds: time until the first result.
      flops: of the case's convolutions, see `ours.dense_flops`.
      share_of_peak: FLOP/s of this package divided by those of a large matrix product.
    """

    name: str
    ours_seconds: float
    ours_bytes: int | None
    ours_compile_seconds: float
    flops: float
    share_of_peak: float
    theirs_by_mode: dict[str, float]
    theirs_seconds: float | None = None
    theirs: str | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    theirs_bytes: int | None = None
    theirs_compile_seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class _Timings:
    """Times for one mode of torchvision, without the programs, which hold memory."""

    ours: list[float]
    theirs: list[float]
    bytes: int | None
    compile_seconds: float


def measure(
    case: Case,
    peak: float,
    *,
    turns: int,
    modes: str | None = "",
    log: Callable[[str], None] = lambda text: None,
) -> Row:
    """Builds a case for both packages and runs them alternately.

    Args:
      case: the workload.
      peak: of matrix products on this machine, FLOP/s.
      turns: runs of each package, for each mode of torchvision.
      modes: text that the measured modes of torchvision contain; None: torchvision is not measured.
      log: called with messages about the progress.
    """
    log(f"{case.name}: compiling ours")
    our_side = ours.build(case)
    matches: dict[str, _Timings] = {}
    for mode in [m for m in theirs.modes(case) if modes is not None and modes in m]:
        log(f"{case.name}: building theirs ({mode})")
        matches[mode] = _time_mode(our_side, theirs.build(case, mode), turns)
        gc.collect()
        log(
            f"{case.name}: ours {statistics.median(matches[mode].ours):.4f} s, theirs ({mode}) "
            f"{statistics.median(matches[mode].theirs):.4f} s"
        )
    by_mode = {mode: statistics.median(match.theirs) for mode, match in matches.items()}
    versus: dict[str, Any] = {}
    if matches:
        best = min(by_mode, key=by_mode.__getitem__)
        match = matches[best]
        our_times = match.ours
        ratios = [b / a for a, b in zip(match.ours, match.theirs, strict=True)]
        versus = {
            "theirs_seconds": by_mode[best],
            "theirs": best,
            "ratio": statistics.median(ratios),
            "ratio_low": min(ratios),
            "ratio_high": max(ratios),
            "theirs_bytes": match.bytes,
            "theirs_compile_seconds": match.compile_seconds,
        }
    else:
        count = _repeats(our_side)
        our_times = [_turn(our_side, count) for _ in range(turns)]
    seconds, flops = statistics.median(our_times), ours.dense_flops(case)
    return Row(
        name=case.name,
        ours_seconds=seconds,
        ours_bytes=our_side.peak_bytes,
        ours_compile_seconds=our_side.compile_seconds,
        flops=flops,
        share_of_peak=flops / seconds / peak,
        theirs_by_mode=by_mode,
        **versus,
    )


def _time_mode(our_side: Built, their_side: Built, turns: int) -> _Timings:
    times = alternate(our_side, their_side, turns)
    return _Timings(*times, their_side.peak_bytes, their_side.compile_seconds)


def alternate(one: Built, other: Built, turns: int) -> tuple[list[float], list[float]]:
    """Returns the seconds per execution of each, by turn."""
    counts = [_repeats(side) for side in (one, other)]
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(turns):
        for side, count, kept in zip((one, other), counts, times, strict=True):
            kept.append(_turn(side, count))
    return times


def _repeats(side: Built) -> int:
    """Returns the number of executions in a turn; also warms up."""
    return max(1, round(_SECONDS_A_TURN / _turn(side, 1)))


def _turn(side: Built, count: int) -> float:
    side.wait()
    begun = time.perf_counter()
    for _ in range(count):
        side.start()
    side.wait()
    return (time.perf_counter() - begun) / count


def matmul_peak(dtype: str) -> float:
    """Returns the FLOP/s of a large square matrix product."""
    side = _MATMUL_SIDE[jax.default_backend()]
    keys = jax.random.split(jax.random.key(0), 2)
    a, b = (jax.random.normal(key, (side, side), jnp.dtype(dtype)) for key in keys)
    return 2.0 * side**3 / _fastest(running(jax.jit(lambda a, b: a @ b), a, b))


def copy_bandwidth() -> float:
    """Returns the bytes per second that a large copy reads and writes."""
    size = _COPIED_BYTES[jax.default_backend()]
    x = jnp.zeros(size // 4, jnp.float32)
    return 2 * size / _fastest(running(jax.jit(lambda x: x + 1), x))


def running(function: Callable[..., Any], *arguments: Any) -> Built:
    """Wraps a compiled function of arrays; keeps its last result."""
    kept: list[Any] = [function(*arguments)]

    def start() -> None:
        kept[0] = function(*arguments)

    return Built(start, lambda: jax.block_until_ready(kept), 0.0, None)


def _fastest(side: Built) -> float:
    count = _repeats(side)
    return min(_turn(side, count) for _ in range(3))


def conditions() -> dict[str, Any]:
    """Returns the machine and the versions of a measurement."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": jax.devices()[0].device_kind,
        "cpu_cores": os.cpu_count(),
        "versions": versions,
    }
