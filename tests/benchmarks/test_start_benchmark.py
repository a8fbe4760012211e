"""The parts of a start, and the time in which the device computes."""

import time
import types

import jax
import jax.numpy as jnp

from benchmarks import device_busy, start


def test_phases_are_timed_with_xlas_parts():
    phases = start.Phases()
    new = float(time.time())  # so that the program is in no cache
    lowered = jax.jit(lambda x: jnp.sort(jnp.linalg.inv(x) @ x * new)).lower(jnp.ones((64, 64)))
    with phases.measure("compile", xla=True):
        lowered.compile()
    assert 0 < phases.seconds["compile"] < 60
    parts = phases.xla["compile"]
    assert any("ompile" in name for name in parts), parts
    seconds = [seconds for seconds, _ in parts.values()]
    assert seconds == sorted(seconds, reverse=True)
    result = {"case": "init", "device": "cpu", "seconds": phases.seconds, "xla": phases.xla}
    assert "XLA's parts of compile" in start.report(result)


def test_the_device_is_busy_while_any_kernel_runs(tmp_path, monkeypatch):
    def line(name, *spans):
        events = [types.SimpleNamespace(start_ns=a * 1e9, end_ns=b * 1e9) for a, b in spans]
        return types.SimpleNamespace(name=name, events=events)

    planes = [
        types.SimpleNamespace(
            name="/device:GPU:0",
            lines=[line("Stream #1", (0, 1), (2, 5)), line("Stream #2", (3, 4), (4, 7))],
        ),
        types.SimpleNamespace(name="/host:CPU", lines=[line("Stream #3", (0, 100))]),
        types.SimpleNamespace(name="/device:GPU:1", lines=[line("Steps", (0, 100))]),
    ]
    data = types.SimpleNamespace(planes=planes)
    monkeypatch.setattr(jax.profiler.ProfileData, "from_file", lambda path: data)
    (tmp_path / "one.xplane.pb").touch()
    assert device_busy.busy_seconds(tmp_path) == 6.0
