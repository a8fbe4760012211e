"""The public names, and what each part of the package imports."""

import functools
import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

import deeplab_jax


@pytest.mark.parametrize("name", [n for n in deeplab_jax.__all__ if n != "__version__"])
def test_public_names_exist(name):
    assert getattr(deeplab_jax, name).__module__.startswith("deeplab_jax.")
    assert name in dir(deeplab_jax)


def test_the_version_is_that_of_the_distribution():
    assert deeplab_jax.__version__ == importlib.metadata.version("deeplab-jax")


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = deeplab_jax.nope


def imported(statement: str, modules: list[str]) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*[m for m in {modules!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


HEAVY = ["tensorflow", "tensorflow_datasets", "cv2", "torch", "ml_collections", "matplotlib"]


def test_models_need_only_jax_flax_and_numpy():
    statement = "import deeplab_jax.models.deeplab; from deeplab_jax import DeepLabV3, architecture"
    assert imported(statement, ["jax", *HEAVY]) == {"jax"}


def test_tensorflow_and_matplotlib_are_imported_only_by_what_needs_them():
    modules = "training.train", "inference.files", "analysis.plots", "visualization.plots"
    statement = "; ".join(f"import deeplab_jax.{module}" for module in modules)
    assert imported(statement, ["matplotlib", "tensorflow"]) == set()


def test_data_workers_need_no_jax():
    assert imported("import deeplab_jax.data.pipeline", ["jax", "flax", "optax"]) == set()


def test_the_command_line_starts_without_jax_and_numpy():
    assert imported("import deeplab_jax.cli.main", ["jax", "numpy", *HEAVY]) == set()


def test_there_is_one_context_variable_and_it_is_the_padding_mask():
    """A context variable is not in jit's key, so arguments and attributes decide instead."""
    sources = pathlib.Path(deeplab_jax.__file__).parent.rglob("*.py")
    holders = [path.name for path in sources if "ContextVar(" in path.read_text()]
    assert holders == ["masking.py"]


def test_an_upward_import_breaks_the_contract_of_the_rooms(tmp_path):
    """`make lint` runs lint-imports, which fails for an upward import added to a copy."""
    root = pathlib.Path(deeplab_jax.__file__).parents[1]
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(root / "deeplab_jax", tmp_path / "deeplab_jax", ignore=ignored)
    shutil.copy(root / "pyproject.toml", tmp_path)
    lint = [pathlib.Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    variables = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = functools.partial(
        subprocess.run, lint, cwd=tmp_path, env=variables, capture_output=True, text=True
    )
    assert run().returncode == 0
    layers = tmp_path / "deeplab_jax" / "models" / "layers.py"
    layers.write_text(layers.read_text() + "\n\nimport deeplab_jax.training.losses  # noqa\n")
    done = run()
    assert done.returncode == 1
    assert "deeplab_jax.models.layers -> deeplab_jax.training.losses" in done.stdout


def test_no_module_is_outside_the_rooms():
    folder = pathlib.Path(deeplab_jax.__file__).parent
    assert [path.name for path in folder.glob("*.py")] == ["__init__.py"]
