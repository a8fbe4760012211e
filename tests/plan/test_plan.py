"""Plans for eight CPU devices, where all numbers follow from shapes, and by the TPU compiler."""

import dataclasses
import importlib.util
import math

import jax
import numpy as np
import pytest

import tiny
from deeplab_jax.analysis.summary import summarize
from deeplab_jax.config import MeshConfig, OptimizerConfig
from deeplab_jax.distributed import mesh as mesh_lib
from deeplab_jax.models.architecture import architecture
from deeplab_jax.models.functional import FunctionalModel
from deeplab_jax.models.ops.convolution import XLA
from deeplab_jax.plan import chips, plan, report
from deeplab_jax.plan.collectives import Collective
from deeplab_jax.plan.plan import Memory, Plan
from deeplab_jax.plan.report import roofline
from deeplab_jax.training.train import resolve_architecture
from deeplab_jax.utils.errors import UserError

V5E = chips.parse("v5e:2x4")


def get_config(**branches):
    return dataclasses.replace(tiny.get_config(), mesh=MeshConfig(), **branches)


@pytest.fixture(scope="module")
def arch():
    return architecture("paper_resnet18", num_classes=5, width=0.125, bn_momentum=0.9)


@pytest.fixture(scope="module")
def compiled(arch):
    """Fields of the plan of the smallest step on eight CPU devices."""
    config = get_config()
    with pytest.MonkeyPatch.context() as patch:
        # As on TPU; on CPU taps that fall off the map have no gradient to sum.
        patch.setattr(plan, "FunctionalModel", lambda arch: FunctionalModel(arch).using(XLA))
        lowered = plan.lower(config, arch, mesh_lib.make_mesh(config.mesh))
    return plan.read(lowered.compile(), V5E)


def bytes_of(tree):
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


# --- What is compiled --------------------------------------------------------------------------


def test_it_is_the_step_that_training_runs():
    config = dataclasses.replace(tiny.get_config(), mesh=MeshConfig(data=2, space=2))
    run = tiny.Run(config)
    theirs = run.step.lower(run.start(), run.batches(1)[0]).as_text()
    ours = plan.lower(config, resolve_architecture(config, run.dataset), run.mesh)
    assert ours.as_text() == theirs


def test_memory_is_the_state_twice_and_its_share_of_the_batch(compiled, arch):
    state = tiny.Run(tiny.get_config()).start()
    height, width = 33, 33
    batch = 8 * height * width * (arch.in_channels + 1)
    memory = compiled["memory"]
    assert memory.arguments == bytes_of(state) + batch // 8
    assert memory.aliased == bytes_of(state)
    assert memory.outputs >= memory.aliased
    assert memory.temporaries > 0
    assert memory.total == (
        memory.arguments + memory.outputs - memory.aliased + memory.temporaries + memory.program
    )


def test_memory_holds_both_moments_of_adamw(compiled, arch):
    config = get_config(optimizer=OptimizerConfig(name="adamw"))
    lowered = plan.lower(config, arch, mesh_lib.make_mesh(config.mesh))
    added = plan.read(lowered.compile(), V5E)["memory"].aliased - compiled["memory"].aliased
    params = FunctionalModel(arch).abstract.params
    assert added == bytes_of(params) + 4  # a moment more than SGD, and Adam's count of steps


def test_what_is_summed_over_devices_is_gradients_statistics_and_the_loss(compiled):
    variables = tiny.Run(tiny.get_config()).start().variables
    scalars = 2 * 4  # sum and count of the loss
    (found,) = compiled["collectives"]
    assert (found.kind, found.group_size) == ("all-reduce", 8)
    assert found.bytes == bytes_of(variables.params) + bytes_of(variables.batch_stats) + scalars


def test_arithmetic_of_the_convolutions_is_three_times_the_summary(arch):
    config = get_config()
    assert plan.convolution_flops(config, arch) == 8 * 3 * 2 * summarize(arch, 33).all.macs


def test_weights_of_classes_need_no_data(arch, monkeypatch):
    lowered = []
    monkeypatch.setattr(plan, "topology_devices", lambda topology: jax.devices())

    def lower(config, arch, mesh):
        lowered.append(config.loss.class_weights)
        raise StopIteration

    monkeypatch.setattr(plan, "lower", lower)
    for weights in ("auto", (1.0, 2.0, 3.0, 4.0, 5.0), None):
        config = get_config()
        config.loss.class_weights = weights
        with pytest.raises(StopIteration):
            plan.make_plan(config, arch, V5E)
    assert lowered == [(1.0,) * 5, (1.0, 2.0, 3.0, 4.0, 5.0), None]
    config.loss.class_weights = (1.0, 2.0)
    with pytest.raises(UserError, match="class_weights has 2 numbers, but there are 5 classes"):
        plan.make_plan(config, arch, V5E)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (("train", "batch_size"), 12, "not divisible by 8 .* nearest that works: 8 or 16"),
        (("mesh", "space"), 3, "mesh.space = 3 does not divide the 8 devices"),
        (("mesh", "space"), 4, "3 rows of features at output stride 16, fewer than"),
    ],
)
def test_configs_that_do_not_suit_the_devices_are_refused(arch, monkeypatch, field, value, message):
    monkeypatch.setattr(plan, "topology_devices", lambda topology: jax.devices())
    config = get_config()
    setattr(getattr(config, field[0]), field[1], value)
    with pytest.raises(UserError, match=message):
        plan.make_plan(config, arch, V5E)


def test_a_compiler_that_refuses_for_memory_is_quoted(arch, monkeypatch):
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError(self.message)

    lowered = Lowered()
    monkeypatch.setattr(plan, "topology_devices", lambda topology: jax.devices())
    monkeypatch.setattr(plan, "lower", lambda config, arch, mesh: lowered)
    lowered.message = "RESOURCE_EXHAUSTED: Ran out of memory: 20G exceeds 15.75G.\nmore"
    found = plan.make_plan(get_config(), arch, V5E)
    assert found.refusal == "Ran out of memory: 20G exceeds 15.75G."
    assert not found.fits
    lowered.message = "INTERNAL: something else"
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        plan.make_plan(get_config(), arch, V5E)


def test_missing_libtpu(monkeypatch):
    from jax.experimental import topologies

    def absent(*_, **__):
        raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology.")

    monkeypatch.setattr(topologies, "get_topology_desc", absent)
    with pytest.raises(UserError, match=r"pip install 'deeplab-jax\[tpu\]'"):
        plan.topology_devices(V5E)


# --- The real compiler -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def libtpu():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("the TPU compiler is not installed: pip install 'deeplab-jax[tpu]'")


def test_the_tpu_compiler_answers(libtpu, arch):
    config = get_config()
    config.model.dtype = "bfloat16"
    found = plan.make_plan(config, dataclasses.replace(arch, dtype="bfloat16"), V5E)
    assert found.fits
    assert found.mesh == (8, 1)
    variables = tiny.Run(tiny.get_config()).start().variables
    # In tiles of 8 x 128 numbers the state takes more than its numbers.
    assert found.memory.arguments > 2 * bytes_of(variables.params)
    assert found.memory.aliased > 2 * bytes_of(variables.params)
    assert found.flops > 0
    kernels = {name: leaf for name, leaf in variables.params.items() if name.endswith("kernel")}
    # Gradients of kernels are summed as they are computed, in bfloat16.
    reduced = sum(one.bytes for one in found.collectives if one.kind == "all-reduce")
    assert reduced > bytes_of(kernels) / 2
    assert reduced < bytes_of(variables.params)
    assert {one.group_size for one in found.collectives} == {8}


def test_the_tpu_compiler_refuses_what_does_not_fit(libtpu, arch):
    config = get_config()
    # So much that it refuses within seconds; near the limit it tries for minutes.
    config.train.batch_size, config.data.crop_size = 1 << 16, (257,)
    found = plan.make_plan(config, dataclasses.replace(arch, dtype="bfloat16"), V5E)
    assert not found.fits
    assert "exceeds available HBM (15.75G)" in found.refusal


@pytest.mark.parametrize("text", ["v5e:1x1", "v5e:4x8", "v6e:16x16", "v4:2x2x2", "v5p:4x4x8"])
def test_topologies_are_known_to_the_compiler(libtpu, text):
    topology = chips.parse(text)
    assert len(plan.topology_devices(topology)) == topology.num_chips
    devices = plan.topology_devices(dataclasses.replace(topology, num_slices=2))
    assert len(devices) == 2 * topology.num_chips
    assert mesh_lib.make_mesh(MeshConfig(), devices).shape["data"] == len(devices)


# --- Chips -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "ports"),
    [
        *(("v5e:1x1", 0), ("v5e:2x2", 2), ("v5e:2x4", 2), ("v5e:8x16", 3), ("v5e:16x16", 4)),
        *(("v4:2x2x1", 2), ("v4:2x2x4", 3), ("v4:4x4x4", 6), ("v5p:4x4x8", 6)),
    ],
)
def test_ports_at_the_corner_of_a_slice(text, ports):
    assert chips.parse(text).num_ports == ports


def test_a_pod_reduces_as_fast_as_is_published():
    """ "All-reduce bandwidth per pod" of 256 chips: v5e 51.2 TB/s, v6e 102.4 TB/s."""
    for name, published in (("v5e:16x16", 51.2e12), ("v6e:16x16", 102.4e12)):
        pod = chips.parse(name)
        assert pod.num_chips * pod.interconnect == pytest.approx(published)


@pytest.mark.parametrize(
    ("text", "slices", "message"),
    [
        ("v5f:4x4", 1, "did you mean 'v5[ep]'?"),
        ("h100", 1, "such as v5e:4x4"),
        ("v5e", 1, "such as v5e:4x4"),
        ("v5e:4x4x4", 1, "has 2 sides of 1 to 16 chips, such as v5e:4x4"),
        ("v5p:4x4", 1, "has 3 sides of 1 to 64 chips, such as v5p:4x4x4"),
        ("v5e:32x16", 1, "has 2 sides of 1 to 16 chips"),
        ("v5e:0x4", 1, "sides of 1 to 16"),
        ("v5e:3x4", 1, "must be even"),
        ("v5e:4x4", 0, "--slices must be 1 or more, got 0"),
    ],
)
def test_wrong_topologies(text, slices, message):
    with pytest.raises(UserError, match=message):
        chips.parse(text, slices)


# --- Arithmetic --------------------------------------------------------------------------------


def planned(**fields):
    memory = Memory(arguments=10, outputs=9, aliased=8, temporaries=70, program=5)
    defaults = {
        "topology": chips.parse("v5e:4x4"),
        "mesh": (16, 1),
        "batch_size": 64,
        "hbm_bytes": 100,
        "convolution_flops": 0.0,
        "compile_seconds": 1.0,
        "memory": memory,
    }
    return Plan(**(defaults | fields))


def test_roofline_by_hand():
    found = roofline(
        planned(
            flops=197e9,
            accessed_bytes=819e7,
            collectives=(
                Collective("all-reduce", 16, 3, 16 * 10**6),
                Collective("collective-permute", 2, 1, 10**6),
            ),
        )
    )
    assert found == {
        "compute_seconds": pytest.approx(1e-3),
        "memory_seconds": pytest.approx(10e-3),
        # Two ports of 50 GB/s at a corner; 2 * 15/16 * 16 MB and 1 MB.
        "interconnect_seconds": pytest.approx(31e6 / 100e9),
        "fastest_step_seconds": pytest.approx(1e-3),
        "step_seconds": pytest.approx(10e-3),
        "images_per_second": pytest.approx(6400),
        "bound_by": "memory",
    }


def test_the_network_between_slices_is_separate():
    one = Collective("all-reduce", 2, 1, 3125 * 10**3, between_slices=True)
    found = roofline(planned(topology=chips.parse("v5e:4x4", 2), collectives=(one,)))
    assert found["interconnect_seconds"] == pytest.approx(1e-3)
    assert found["bound_by"] == "interconnect"


def test_a_single_chip_sends_nothing():
    one = Collective("all-reduce", 1, 4, 1000)
    idle = planned(topology=chips.parse("v5e:1x1"), collectives=(one,))
    found = roofline(idle)
    assert (found["step_seconds"], found["images_per_second"]) == (0, None)
    (step,) = (text for name, text in report.summary_rows(idle) if name == "a step, estimated")
    assert "inf images/s; at most inf if" in step


def test_all_reduce_equals_a_simulated_ring():
    """n chips with n pieces each: 2 (n - 1) times each sends one piece to its neighbour."""
    n, piece = 5, 3
    values = np.random.default_rng(0).integers(0, 9, (n, n, piece))
    sums, sent = values.copy(), 0
    for turn in range(n - 1):  # reduce-scatter
        moving = [(chip, (chip - turn) % n) for chip in range(n)]
        taken = [sums[chip, part].copy() for chip, part in moving]
        for (chip, part), data in zip(moving, taken, strict=True):
            sums[(chip + 1) % n, part] += data
        sent += piece
    for turn in range(n - 1):  # all-gather
        moving = [(chip, (chip + 1 - turn) % n) for chip in range(n)]
        taken = [sums[chip, part].copy() for chip, part in moving]
        for (chip, part), data in zip(moving, taken, strict=True):
            sums[(chip + 1) % n, part] = data
        sent += piece
    np.testing.assert_array_equal(sums, np.broadcast_to(values.sum(0), sums.shape))
    assert Collective("all-reduce", n, 1, n * piece).sent_bytes == sent


def test_what_fits():
    assert planned(hbm_bytes=86).fits
    assert not planned(hbm_bytes=85).fits
    assert not planned(memory=None, refusal="no").fits


def test_guesses_from_one_plan():
    assert plan.estimate_max_batch(planned(hbm_bytes=100)) == 64 * (100 - 16) // 70
    assert plan.estimate_max_batch(planned(hbm_bytes=1000)) == 64 * 984 // 70
    assert plan.estimate_max_batch(planned(memory=None)) == 0


# --- Search ------------------------------------------------------------------------------------


def counting(asked, most):
    """Returns a predicate that is true up to `most` and records its arguments."""

    def fits(number):
        asked.append(number)
        return number <= most

    return fits


@pytest.mark.parametrize("guess", [-3, 1, 2, 7, 20, 32, 99])
@pytest.mark.parametrize("most", [0, 1, 2, 6, 7, 19, 31, 32, 50])
def test_the_largest_that_fits(guess, most):
    asked = []
    assert plan.largest(counting(asked, most), guess, limit=32) == min(most, 32)
    assert len(set(asked)) == len(asked)
    assert all(1 <= number <= 32 for number in asked)


def test_a_good_estimate_needs_few_compilations():
    for guess in (498, 499, 500, 501, 502):
        asked = []
        assert plan.largest(counting(asked, 500), guess, limit=100_000) == 500
        assert len(asked) <= 4


def test_a_bad_estimate_needs_logarithmically_many_compilations():
    for guess, most in ((1, 5000), (100_000, 5000), (60_000, 0)):
        asked = []
        assert plan.largest(counting(asked, most), guess, limit=100_000) == most
        assert len(asked) <= 2 * 17 + 1


def test_multiples_of_a_batch(monkeypatch):
    monkeypatch.setattr(plan, "topology_devices", lambda topology: jax.devices())
    config = get_config(optimizer=OptimizerConfig(accumulate=3))
    assert plan.batch_multiple(config, V5E) == 24
    config.mesh.space = 2
    assert plan.batch_multiple(config, V5E) == 12
