"""Settings of the whole suite: fake devices, cached compilation, exact matrix products."""

import dataclasses
import gc
import os
import pathlib
import sys

import hypothesis
import jax
import pytest
from jaxtyping import install_import_hook

# Garbage collection visits all imported modules each time, which takes a tenth of the suite's time.
gc.disable()  # until `pytest_collection_finish`

# Programs of tests are small: compiling them costs more than running them, and much of that are
# LLVM's optimizations. Read when the first program is compiled, also by commands that tests start.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if jax.__version_info__ < (0, 11):  # a flag that XLA does not know ends the program
    QUICK += " --xla_cpu_use_fusion_emitters=false"  # the older ones: half the time of compiling
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}"

# Before the package is imported: shapes that stand in signatures are checked at every call.
# (`models.architecture` and `models.deeplab` have checks of their own, in better words.)
install_import_hook(
    [
        "deeplab_jax.evaluation.confusion",
        "deeplab_jax.inference.sliding_window",
        "deeplab_jax.utils.files",
        "deeplab_jax.data.color",
        "deeplab_jax.data.io.images",
        "deeplab_jax.data.mixing",
        "deeplab_jax.models.backbones.mobilenet",
        "deeplab_jax.models.backbones.resnet",
        "deeplab_jax.models.decoders",
        "deeplab_jax.models.functional",
        "deeplab_jax.models.heads",
        "deeplab_jax.models.layers",
        "deeplab_jax.models.ops.atrous_conv",
        "deeplab_jax.models.ops.batch_norm",
        "deeplab_jax.models.ops.convolution",
        "deeplab_jax.models.ops.depthwise_conv",
        "deeplab_jax.models.ops.masking",
        "deeplab_jax.models.ops.pooling",
        "deeplab_jax.models.ops.resize",
        "deeplab_jax.models.ops.same_padding",
        "deeplab_jax.visualization.overlays",
        "deeplab_jax.visualization.plots",
        "deeplab_jax.inference.files",
        "deeplab_jax.training.class_weights",
        "deeplab_jax.training.losses",
        "deeplab_jax.training.receipt",
    ],
    "shape_checks.check",
)

# The same examples at every run, however slow the machine: what fails here fails everywhere.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True)
hypothesis.settings.load_profile("suite")

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARED = pathlib.Path(os.environ.get("DEEPLAB_JAX_TEST_DATA", ROOT.parent / "shared"))

jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
if jax.config.jax_platforms == "cpu":
    jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


# What other versions of Python, jax and flax are tested with; see `make test-newest`.
CORE = (
    "models/",
    "inference/test_compilation.py",
    "training/test_train.py::test_output_and_files_of_a_run",
    "training/test_train.py::test_a_run_killed_repeatedly_ends_as_if_never_killed",
    "cli/test_predict.py::test_each_image_gets_its_ids_its_overlay_and_its_areas",
)


def pytest_collection_finish():
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.nodeid.removeprefix("tests/").startswith(CORE):
            item.add_marker(pytest.mark.core)


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder of real test data; tests that need it are skipped where it is absent."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip(f"real test data is not at {folder}; set DEEPLAB_JAX_TEST_DATA to its parent")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> pathlib.Path:
    """The folder of a small checkpoint of three classes."""
    import small_checkpoint

    path = tmp_path_factory.mktemp("model") / "fox"
    small_checkpoint.write(path)
    return path


@pytest.fixture(scope="module", autouse=True)
def compiled_programs():
    """Forgets a module's programs: all together take 10 GB of memory, and no other uses them."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session", autouse=True)
def no_exit_at_once():
    """Commands in this process would end pytest, if a thread still compiles."""
    from deeplab_jax.cli import errors

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(errors, "_exit_at_once", lambda code: None)
        yield


@pytest.fixture
def command(monkeypatch, capfd):
    """Runs `deeplab-jax` with arguments; its exit code, stdout and stderr."""
    from deeplab_jax.cli.main import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["deeplab-jax", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capfd.readouterr()
        jax.config.update("jax_enable_compilation_cache", True)  # `plan` switches it off
        return end.value.code or 0, out, err

    return run


@pytest.fixture(scope="module")
def shared_steps():
    """Runs that differ only in data, initial weights, evaluation or logs share one training step.

    It is traced and compiled once.
    """
    from deeplab_jax.config import DataConfig, EvalConfig, InitConfig, TrainConfig
    from deeplab_jax.training import train

    compile_step, steps = train.compile_step, {}

    def compile_once(config, model, mesh):
        crop, mean, std = config.data.crop_size, config.data.mean, config.data.std
        data = DataConfig(crop_size=crop, mean=mean, std=std)
        branches = {"data": data, "init": InitConfig(), "eval": EvalConfig()}
        default = TrainConfig()
        unused = ("log_every", "eval_every", "save_every", "keep", "receipt_every", "loggers")
        unused = {name: getattr(default, name) for name in (*unused, "strict_resume")}
        branches["train"] = dataclasses.replace(config.train, **unused)
        alike = dataclasses.replace(config, **branches)
        key = repr((model.architecture, alike, mesh))
        if key not in steps:
            steps[key] = compile_step(config, model, mesh)
        return steps[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "compile_step", compile_once)
        yield


@pytest.fixture
def x64():
    """Switches 64-bit arrays on for one test."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)
