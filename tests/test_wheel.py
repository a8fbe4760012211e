"""The source distribution and the wheel that is built from it.

`make dist` runs these tests on the files in `dist/`, with dependencies from the package index.
"""

import email
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

from conftest import ROOT

RELEASED = os.environ.get("DEEPLAB_JAX_DIST")
NOT_RELEASED = {".ci/run", ".gitignore"}


@pytest.fixture(scope="module")
def repository() -> set[str]:
    """The files of the repository, and those that are about to be added."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not in a clone")
    return {name for name in done.stdout.splitlines() if (ROOT / name).exists()}


@pytest.fixture(scope="module")
def dist(tmp_path_factory, repository) -> pathlib.Path:
    if RELEASED:
        return pathlib.Path(RELEASED)
    source = tmp_path_factory.mktemp("source")  # a copy, as building leaves files
    caches = {"tests/__pycache__/a.pyc", "deeplab_jax/__pycache__/a.pyc", ".cache/a", "runs/a"}
    for name in repository | caches:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if name in caches:
            (source / name).touch()
        else:
            shutil.copy(ROOT / name, source / name, follow_symlinks=False)
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", source], check=True, capture_output=True
    )
    return source / "dist"


@pytest.fixture(scope="module")
def wheel(dist) -> pathlib.Path:
    (built,) = dist.glob("*.whl")
    return built


def test_the_package_index_accepts_them(dist):
    command = [sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("PASSED") == 2


def configs(repository) -> set[str]:
    """The configs as files of the package, where the repository has a link."""
    return {f"deeplab_jax/{name}" for name in repository if name.startswith("configs/")}


def test_the_source_distribution_is_the_repository_without_caches(dist, repository):
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        files = {member.name.partition("/")[2] for member in archive if member.isfile()}
    built = {name for name in files if name.startswith("deeplab_jax.egg-info/")}
    expected = repository - NOT_RELEASED - {"deeplab_jax/configs"} | configs(repository)
    assert files - built - {"PKG-INFO", "setup.cfg"} == expected


def test_the_wheel_is_the_package_and_the_configs(wheel, repository):
    names = zipfile.ZipFile(wheel).namelist()
    package = {name for name in repository if name.startswith("deeplab_jax/")}
    expected = package - {"deeplab_jax/configs"} | configs(repository)
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert {"deeplab_jax/configs/voc_os16.py", "deeplab_jax/py.typed"} <= expected


def test_the_wheel_names_its_extras(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
    needs = {need.replace(" ", "").replace('"', "'") for need in metadata.get_all("Requires-Dist")}
    for extra, of_jax in (("cuda", "cuda12"), ("cuda12", "cuda12"), ("cuda13", "cuda13")):
        assert f"jax[{of_jax}];extra=='{extra}'" in needs


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> pathlib.Path:
    """The commands of a new environment, with this one's dependencies (or the package index's)."""
    environment = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    pip = [sys.executable, "-m", "pip", f"--python={environment}/bin/python", "install", "--quiet"]
    if not RELEASED:
        pip.append("--no-deps")
        site = next(environment.glob("lib/python*/site-packages"))
        ours = next(path for path in map(pathlib.Path, sys.path) if path.name == "site-packages")
        # Behind the environment's own folder on the path, so that the clone's package is not found.
        (site / "packages.pth").write_text(f"{ours}\n")
    subprocess.run([*pip, wheel], check=True)
    return environment / "bin"


def test_installed_it_trains_predicts_and_runs_the_example_of_the_readme(
    installed, wheel, tmp_path
):
    def run(command, *arguments):
        variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(
            [installed / command, *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=variables | {"JAX_PLATFORMS": "cpu"},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    short = {
        "train.steps": 3,
        "optimizer.warmup_steps": 0,
        "train.batch_size": 4,
        "model.width": 0.0625,
        "data.num_workers": 0,
        "data.shapes.num_eval": 2,
    }
    settings = (f"--config.{key}={value}" for key, value in short.items())
    assert "at step 3" in run("deeplab-jax", "train", "shapes", "--workdir=runs/mine", *settings)
    picture = next((tmp_path / "runs" / "mine" / "pictures").glob("*.png"))
    run("deeplab-jax", "predict", "runs/mine", picture, "--out", "predicted")
    assert list((tmp_path / "predicted").glob("*_ids.png"))
    picture.rename(tmp_path / "photo.jpg")
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    shown = run("python", "-I", "-c", f"{example}\nprint(dl.__version__, dl.__file__)")
    version, file = shown.split()[-2:]
    assert wheel.name.startswith(f"deeplab_jax-{version}-")
    assert file.startswith(str(installed.parent))


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
