"""Meshes: results do not depend on the mesh, and impossible meshes are refused."""

import importlib
import types

import jax
import numpy as np
import pytest

from conftest import ROOT
from deeplab_jax.config import MeshConfig
from deeplab_jax.distributed import mesh as mesh_lib
from deeplab_jax.distributed.mesh import make_mesh
from deeplab_jax.utils.errors import UserError


@pytest.fixture(scope="module")
def benchmark():
    """`benchmarks/mesh.py`: some of its cases run here, all are in its recorded results."""
    yield importlib.import_module("mesh")
    jax.config.update("jax_enable_x64", False)


def test_ten_steps_and_their_evaluation_do_not_depend_on_the_mesh(benchmark):
    case = benchmark.Case("curve", "4 x 2, fully sharded", "float64")
    found = benchmark.measure(case)
    assert benchmark.violations(case, found) == []
    assert found["loss"] > 0  # one device was not compared with itself


def test_recorded_differences_are_within_limits(benchmark):
    rows = benchmark.read(ROOT / "benchmarks" / "results" / "mesh_cpu.json")
    assert set(rows) == set(benchmark.all_cases())
    for case, found in rows.items():
        assert benchmark.violations(case, found) == []


@pytest.mark.parametrize(
    ("name", "height", "space"),
    [
        ("pre-activation, deep stem, learned decoder", 113, 8),
        ("MobileNetV3", 50, 4),
        ("ResNet-D, separable DeepLabv3+, aligned corners", 50, 4),
        ("MobileNetV2, SAME padding", 50, 4),
    ],
)
def test_gradients_do_not_depend_on_spatial_partitioning(benchmark, name, height, space):
    case = benchmark.Case("gradients", name, "float64", height, space)
    assert benchmark.violations(case, benchmark.measure(case)) == []


def test_differences_beyond_a_limit_are_reported(benchmark):
    case = benchmark.Case("curve", "2 x 1", "float32")
    found = {"loss": 1e-4, "parameters": float("nan"), "confusion": 1.0, "gradient norm": 1e-3}
    assert [line.split(": ")[-1] for line in benchmark.violations(case, found)] == [
        "loss differs by 1.0e-04",
        "parameters differs by nan",
        "confusion differs by 1.0e+00",
    ]


@pytest.mark.parametrize(
    ("data", "space", "shape"), [(-1, 1, (8, 1)), (-1, 4, (2, 4)), (3, 2, (3, 2)), (1, 1, (1, 1))]
)
def test_its_axes(data, space, shape):
    mesh = make_mesh(MeshConfig(data=data, space=space))
    assert dict(mesh.shape) == {"data": shape[0], "space": shape[1]}
    assert mesh.devices.shape == shape


@pytest.mark.parametrize(
    ("data", "space", "message"),
    [
        (-1, 3, r"mesh\.space = 3 does not divide the 8 devices"),
        (-1, 16, r"mesh\.space = 16 does not divide the 8 devices"),
        (5, 2, r"mesh\.data = 5 with mesh\.space = 2 needs 10 devices, but there are 8 \(cpu\)"),
        (9, 1, r"needs 9 devices"),
    ],
)
def test_impossible_meshes(data, space, message):
    with pytest.raises(UserError, match=message):
        make_mesh(MeshConfig(data=data, space=space))


class Device:
    """A device of another machine, as far as `make_mesh` looks at it."""

    platform = "tpu"

    def __init__(self, process_index):
        self.process_index = process_index


def test_a_process_without_a_device_is_refused():
    devices = [Device(0), Device(0), Device(1), Device(1)]
    with pytest.raises(UserError, match="takes 2 of 4 devices and leaves process 1 none"):
        make_mesh(MeshConfig(data=2), devices)


@pytest.mark.parametrize(("data", "space"), [(2, 1), (-1, 4)])
def test_a_mesh_that_slices_do_not_divide_is_refused(data, space):
    def device(index):
        return types.SimpleNamespace(process_index=0, platform="tpu", slice_index=index // 2)

    with pytest.raises(UserError, match="does not divide 8 devices into 4 slices"):
        make_mesh(MeshConfig(data=data, space=space), [device(index) for index in range(8)])


def test_few_rows_of_features_are_refused_with_the_height_that_works():
    mesh = make_mesh(MeshConfig(data=1, space=8))
    mesh_lib.check_height("crop", 113, 16, mesh)
    with pytest.raises(UserError, match=r"112 rows have 7 .* stride 16, .*: use images of 113"):
        mesh_lib.check_height("crop", 112, 16, mesh)


@pytest.mark.parametrize("space", [1, 2, 4])
def test_a_batch_comes_back_as_it_was_whatever_its_height(space):
    mesh = make_mesh(MeshConfig(data=2, space=space))
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (4, 33, 5, 3), np.uint8)
    placed = mesh_lib.to_global({"image": image, "index": np.arange(4)}, mesh, 4)
    assert placed["image"].shape[1] % space == 0
    assert placed["image"].addressable_shards[0].data.shape[:2] == (2, -(-33 // space))
    unpadded = jax.jit(lambda x: mesh_lib.unpad_height(x, 33, mesh))(placed["image"])
    np.testing.assert_array_equal(unpadded, image)
    np.testing.assert_array_equal(placed["index"], np.arange(4))
    assert mesh_lib.local_rows(mesh, 4) == [0, 1, 2, 3]
    by_rows = jax.device_put(image, mesh_lib.row_sharding(mesh))
    np.testing.assert_array_equal(mesh_lib.addressable_rows(by_rows), image)


def test_a_fully_sharded_state():
    mesh = make_mesh(MeshConfig(data=4, space=2))
    tree = {
        "kernel": np.arange(3 * 3 * 8 * 16.0).reshape(3, 3, 8, 16),
        "odd": np.ones((3, 3, 3, 7)),
        "vector": np.ones(16),
        "step": np.ones(()),
    }
    replicated = mesh_lib.device_put(tree, mesh_lib.shardings(tree, mesh, fully_sharded=False))
    sharded = mesh_lib.device_put(tree, mesh_lib.shardings(tree, mesh, fully_sharded=True))
    shapes = {name: leaf.addressable_shards[0].data.shape for name, leaf in sharded.items()}
    assert shapes == {"kernel": (3, 3, 8, 4), "odd": (3, 3, 3, 7), "vector": (16,), "step": ()}
    assert all(leaf.is_fully_replicated for leaf in replicated.values())
    again = mesh_lib.replicate(replicated, mesh)
    assert all(again[name] is replicated[name] for name in tree)  # not copied
    gathered = mesh_lib.replicate(sharded, mesh)
    assert all(leaf.is_fully_replicated for leaf in gathered.values())
    jax.tree.map(np.testing.assert_array_equal, gathered, tree)
