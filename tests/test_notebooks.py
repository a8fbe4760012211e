"""The notebooks run from top to bottom, and their stored outputs are those of their cells."""

import base64
import concurrent.futures
import importlib.util
import io
import re
import runpy
import tomllib

import nbformat
import pytest
from PIL import Image

import small_checkpoint
from conftest import ROOT

EXECUTE = runpy.run_path(str(ROOT / "notebooks" / "execute.py"))
NAMES = EXECUTE["NAMES"]
URLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("urls", {})
MAX_BYTES = 400_000


def outputs(notebook):
    return [each for cell in notebook.cells for each in cell.get("outputs", ())]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Executes all notebooks with small settings, two at a time; futures by name."""
    scratch = tmp_path_factory.mktemp("notebooks")
    small_checkpoint.write(scratch / "model")
    env = {"DEEPLAB_JAX_SMALL": "1", "DEEPLAB_MODEL": str(scratch / "model")}
    env |= {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax")}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(EXECUTE["execute"], name, scratch / name, env) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(runs, name):
    notebook = runs[name].result()
    EXECUTE["tidy"](notebook)
    assert {"stderr", "error"}.isdisjoint(kinds(notebook))


def kinds(notebook):
    return {each.get("name", each.output_type) for each in outputs(notebook)}


@pytest.mark.parametrize("name", NAMES)
def test_stored_outputs_are_those_of_the_cells(name):
    path = ROOT / "notebooks" / f"{name}.ipynb"
    assert path.stat().st_size < MAX_BYTES
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    changed = notebook.metadata.executed_code != EXECUTE["digest"](notebook)
    assert not changed, f"the cells have changed since: make notebooks NAMES={name}"
    assert {"stderr", "error"}.isdisjoint(kinds(notebook))
    pictures = [each.data.get("image/png") for each in outputs(notebook) if "data" in each]
    pictures = [Image.open(io.BytesIO(base64.b64decode(each))) for each in pictures if each]
    assert len(pictures) >= (1 if name == "from_torchvision" else 3)
    for picture in pictures:
        assert len(picture.convert("L").getcolors()) > 1
    text = re.sub(r'"image/png": ".*"', "", path.read_text())
    assert not re.search(r"[\"' (](/[a-z]\w+/|[A-Z]:\\)| at 0x|Traceback|Warning", text)


@pytest.mark.parametrize("name", NAMES)
def test_addresses_and_links(name):
    path, repository = ROOT / "notebooks" / f"{name}.ipynb", URLS["Repository"]
    text, (first, install) = path.read_text(), nbformat.read(path, as_version=4).cells[:2]
    colab = repository.replace("https://github.com", "https://colab.research.google.com/github")
    assert f"({colab}/blob/main/notebooks/{name}.ipynb)" in first.source
    assert f'deeplab-jax{{extra}} @ git+{repository}"' in install.source
    named = re.findall(r"(?:hub|content|google)\.com/(?:github/)?([\w-]+/deeplab_\w+)", text)
    assert {f"https://github.com/{each}" for each in named} == {repository}
    for link in re.findall(r"\]\(([\w./]+)\)", text):
        assert (path.parent / link).exists(), link


def test_without_torchvision_a_line_says_what_to_install(monkeypatch):
    path = ROOT / "notebooks" / "from_torchvision.ipynb"
    cell = nbformat.read(path, as_version=4).cells[1].source.replace("%pip", "# pip")
    monkeypatch.setattr(importlib.util, "find_spec", {"deeplab_jax": "found"}.get)
    with pytest.raises(
        SystemExit, match=r"^This notebook needs .*: pip install torch torchvision$"
    ):
        exec(cell, {})


def test_a_failing_cell_is_named(tmp_path, monkeypatch):
    cell = nbformat.v4.new_code_cell("1 / 0  # the guilty one")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "broken.ipynb")
    monkeypatch.setitem(EXECUTE["execute"].__globals__, "FOLDER", tmp_path)
    with pytest.raises(RuntimeError, match=r"(?s)broken.*the guilty one.*ZeroDivisionError"):
        EXECUTE["execute"]("broken", tmp_path, {})
