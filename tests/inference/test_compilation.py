"""Compilation of inference: with oneDNN if XLA supports it, with the same results everywhere."""

import concurrent.futures
import functools
import threading
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deeplab_jax.inference import compilation
from deeplab_jax.inference.compilation import Programs
from deeplab_jax.models.architecture import architecture
from deeplab_jax.models.functional import FunctionalModel
from deeplab_jax.models.ops.atrous_conv import atrous_conv
from deeplab_jax.models.ops.convolution import FASTEST, ONEDNN, XLA
from random_modules import random_variables

ARCHITECTURES = ("paper_resnet18", "torchvision_resnet50", "torchvision_mobilenet_v3_large")


@pytest.fixture
def onednn():
    if not compilation.has_onednn():
        pytest.skip("this jaxlib does not call oneDNN")


@pytest.fixture(autouse=True)
def tried_anew():
    yield
    compilation.has_onednn.cache_clear()


@pytest.mark.parametrize("has_onednn", [True, False])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_inference_does_not_depend_on_how_it_is_compiled(name, has_onednn, monkeypatch):
    model = FunctionalModel(architecture(name, num_classes=3, width=0.25, output_stride=8))
    variables = model.fuse(random_variables(model))
    images = jnp.asarray(np.random.default_rng(1).normal(size=(2, 65, 49, 3)), jnp.float32)
    plain = model.fused.using(XLA)
    expected = jax.jit(lambda v, x: plain.apply(v, x)[0])(variables, images)
    monkeypatch.setattr(compilation, "has_onednn", lambda: has_onednn)
    run = compilation.jit_inference(lambda model, v, x: model.apply(v, x)[0], model.fused)
    found = run(variables, images)
    for head, logits in expected.items():
        scale = float(jnp.abs(logits).max())
        np.testing.assert_allclose(found[head], logits, atol=1e-5 * scale)


def test_all_convolutions_are_onednns_and_include_the_sums(onednn):
    model = FunctionalModel(architecture("torchvision_resnet50", num_classes=3, width=0.25))
    images = jax.ShapeDtypeStruct((1, 65, 65, 3), jnp.float32)
    run = compilation.jit_inference(lambda model, v, x: model.apply(v, x)[0]["out"], model.fused)
    program = run.lower(model.fused.abstract, images).compile().as_text()
    assert program.count('custom_call_target="__onednn$convolution"') >= 53
    assert " convolution(" not in program
    assert program.count("BINARY_ADD") + program.count('"SUM"') == 16  # residual blocks


class OneConvolution:
    """In a model's place: one convolution, of some implementation."""

    def __init__(self, implementation=FASTEST):
        self.implementation = implementation

    def using(self, implementation):
        return OneConvolution(implementation)


def test_without_onednn_convolutions_use_the_usual_implementation(monkeypatch):
    used = []

    def run():
        function = lambda model, x: used.append(model.implementation)  # noqa: E731
        compilation.jit_inference(function, OneConvolution())(1.0)

    monkeypatch.setattr(compilation, "has_onednn", lambda: False)
    run()
    monkeypatch.setattr(compilation, "has_onednn", lambda: True)
    run()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    run()
    assert used == [FASTEST, ONEDNN, FASTEST]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_depthwise_convolutions_are_not_left_to_onednn(monkeypatch, dtype):
    monkeypatch.setattr(compilation, "has_onednn", lambda: True)
    chosen = architecture("torchvision_mobilenet_v3_large", num_classes=3, width=0.25, dtype=dtype)
    model = FunctionalModel(chosen)
    images = jax.ShapeDtypeStruct((1, 33, 33, 3), jnp.float32)
    run = compilation.jit_inference(lambda model, v, x: model.apply(v, x)[0]["out"], model.fused)
    program = run.lower(model.fused.abstract, images).as_text()
    assert "feature_group_count = 1 " in program
    grouped = [line for line in program.splitlines() if "feature_group_count = " in line]
    assert all("feature_group_count = 1 " in line for line in grouped)


def test_a_version_without_the_options_has_no_onednn(monkeypatch):
    compilation.has_onednn.cache_clear()
    monkeypatch.setattr(compilation, "ONEDNN_OPTIONS", {"xla_cpu_no_such_option": True})
    assert not compilation.has_onednn()


def test_a_program_that_cannot_be_cached_gives_no_warning(onednn):
    option = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.values[option]
    arrays = jnp.ones((1, 9, 9, 8)), jnp.ones((3, 3, 8, 8))
    conv = functools.partial(atrous_conv, method="native")
    jax.config.update(option, 0.0)  # else so small a program is not to be kept at all
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            compilation.has_onednn.cache_clear()
            compilation.jit_inference(lambda _, x, k: conv(x, k) + np.pi, OneConvolution())(*arrays)
        options = compilation.ONEDNN_OPTIONS
        with pytest.warns(UserWarning, match="persistent"):
            jax.jit(lambda x, k: conv(x, k) + np.e, compiler_options=options)(*arrays)
    finally:
        jax.config.update(option, before)
    assert [str(warning.message) for warning in said] == []


# --- Programs ----------------------------------------------------------------------------------


def counting_function():
    traced = []

    def double(x):
        traced.append((x.shape, threading.current_thread()))
        return 2 * x

    return traced, Programs({"double": jax.jit(double)})


def test_a_prepared_program_is_compiled_once_in_a_thread_and_shared():
    traced, programs = counting_function()
    shape = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    programs.prepare("double", shape)
    programs.prepare("double", shape)
    result = programs("double", jnp.ones((2, 3)))
    np.testing.assert_array_equal(result, np.full((2, 3), 2.0))
    assert len(programs) == len(traced) == 1
    assert traced[0][1] is not threading.current_thread()
    for shape in ((2,), (3,), (2,)):
        assert programs("double", jnp.ones(shape)).shape == shape
    assert [shape for shape, _ in traced] == [(2, 3), (2,), (3,)]
    # In their own thread, calls see JAX's settings by context.
    assert all(thread is threading.current_thread() for _, thread in traced[1:])
    with jax.enable_x64(True):
        assert programs("double", np.ones(4)).dtype == np.float64


def test_an_error_of_a_thread_is_raised_where_the_program_is_called():
    def fail(x):
        raise ValueError("no such program")

    programs = Programs({"fail": jax.jit(fail)})
    programs.prepare("fail", jax.ShapeDtypeStruct((), jnp.float32))
    with pytest.raises(ValueError, match="no such program"):
        programs("fail", jnp.zeros(()))


def test_on_gpu_one_program_is_compiled_at_a_time(monkeypatch):
    running, most = [], []

    class Lowered:
        def compile(self):
            running.append(self)
            most.append(len(running))
            time.sleep(0.02)
            running.remove(self)

    def most_at_once(backend):
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        most.clear()
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            list(pool.map(compilation.compile_lowered, [Lowered() for _ in range(3)]))
        return max(most)

    assert most_at_once("gpu") == 1
    assert most_at_once("cpu") > 1
