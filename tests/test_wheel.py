"""The wheel, installed away from the clone, trains and predicts."""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

from conftest import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy, as building leaves files beside what is built
    for name in ("deeplab_jax", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    subprocess.run([*command, f"--wheel-dir={folder}", source], check=True, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def test_it_contains_the_configs_and_py_typed(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("configs/voc_os16.py", "configs/paper.py", "py.typed", "cli/main.py"):
        assert f"deeplab_jax/{name}" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"deeplab_jax"}


def test_it_trains_and_predicts_without_a_clone(wheel, tmp_path):
    """Uses a new environment, with the dependencies of this one."""
    environment = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    site = next((environment / "lib").glob("python*/site-packages"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # Behind the wheel's own folder on the path, so that the clone's package is not found first.
    ours = next(path for path in map(pathlib.Path, sys.path) if path.name == "site-packages")
    (site / "packages.pth").write_text(f"{ours}\n")
    python = environment / "bin" / "python"

    def command(*arguments):
        code = "from deeplab_jax.cli.main import main\nmain()"
        variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        return subprocess.run(
            [python, "-I", "-c", code, *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=variables | {"JAX_PLATFORMS": "cpu"},
        )

    short = {
        "train.steps": 3,
        "optimizer.warmup_steps": 0,
        "train.batch_size": 4,
        "model.width": 0.0625,
        "data.num_workers": 0,
        "data.shapes.num_eval": 2,
    }
    done = command(
        "train", "shapes", "--workdir=run", *(f"--config.{k}={v}" for k, v in short.items())
    )
    assert done.returncode == 0, done.stderr
    assert "at step 3" in done.stdout
    picture = next((tmp_path / "run" / "pictures").glob("*.png"))
    done = command("predict", "run", picture, "--out", "predicted")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "predicted").glob("*_ids.png"))
    where = subprocess.run(
        [python, "-I", "-c", "import deeplab_jax; print(deeplab_jax.__file__)"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert where.stdout.startswith(str(environment))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vocos16"], "there is no config 'vocos16' (did you mean 'voc_os16'?)"),
        (["paper:table1_os7"], "has no row 'table1_os7' (did you mean 'table1_os8'?)"),
        (["voc_os16"], "workdir"),
        (["shapes", "--workdir=x", "--config.train.step=3"], "nearest: train.steps"),
    ],
)
def test_mistakes_are_reported_without_a_traceback(arguments, message, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "deeplab_jax.cli", "train", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_help_shows_examples_and_flags():
    done = subprocess.run(
        [sys.executable, "-m", "deeplab_jax.cli", "train", "--help"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    for words in ("deeplab-jax train voc_os16", "--workdir", "--coordinator"):
        assert words in done.stdout
