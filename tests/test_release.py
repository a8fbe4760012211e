"""The files by which people find, cite, join and release the project."""

import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement

import resolve_extras
from conftest import ROOT

GITHUB = ROOT / ".github"
WORKFLOWS = sorted(GITHUB.glob("workflows/*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SCHEMAS = {
    "vendor.citation-file-format": [ROOT / "CITATION.cff"],
    "vendor.dependabot": [GITHUB / "dependabot.yml"],
    "vendor.github-issue-config": [GITHUB / "ISSUE_TEMPLATE" / "config.yml"],
    "vendor.github-issue-forms": [
        GITHUB / "ISSUE_TEMPLATE" / "bug.yml",
        GITHUB / "ISSUE_TEMPLATE" / "feature.yml",
    ],
    "vendor.github-workflows": WORKFLOWS,
}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_files_follow_their_schema(schema):
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema]
    done = subprocess.run([*command, *SCHEMAS[schema]], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def zizmor(*paths):
    command = pathlib.Path(sys.executable).with_name("zizmor")
    return subprocess.run(
        [command, "--offline", "--no-progress", *paths], capture_output=True, text=True
    )


def test_zizmor_finds_nothing_in_the_workflows(tmp_path):
    done = zizmor(GITHUB)
    assert done.returncode == 0, done.stdout
    unpinned = WORKFLOWS[0].read_text().replace("persist-credentials: false", "fetch-depth: 1")
    (tmp_path / "workflow.yml").write_text(re.sub("@[0-9a-f]{40}", "@v6", unpinned))
    found = zizmor(tmp_path / "workflow.yml").stdout
    assert "unpinned-uses" in found
    assert "artipacked" in found


def test_workflows_call_targets_that_exist_on_the_supported_pythons():
    texts = [path.read_text() for path in WORKFLOWS]
    targets = set(re.findall(r"run: make ([\w-]+)|target: ([\w-]+)", "\n".join(texts)))
    makefile = (ROOT / "Makefile").read_text()
    for target in {a or b for a, b in targets}:
        assert re.search(f"^{target}:", makefile, re.M), target
    matrix = yaml.safe_load((GITHUB / "workflows" / "tests.yml").read_text())["jobs"]["tests"]
    pythons = {case["python"] for case in matrix["strategy"]["matrix"]["include"]}
    assert pythons == set(resolve_extras.PYTHONS)
    assert PROJECT["requires-python"] == f">={min(pythons, key=lambda v: int(v[2:]))}"


NAMING = [
    *(ROOT / name for name in ("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "SECURITY.md")),
    *GITHUB.rglob("*.yml"),
]


@pytest.mark.parametrize("path", NAMING, ids=lambda path: path.name)
def test_addresses_are_those_of_pyproject(path):
    ours = tuple(PROJECT["urls"].values())
    for url in re.findall(r"https://[^\s)\"]*deeplab[-_]jax[^\s)\"]*", path.read_text()):
        assert url.startswith((*ours, "https://pypi.org/project/deeplab-jax")), url


def test_the_changelog_describes_the_version():
    text = (ROOT / "CHANGELOG.md").read_text()
    sections = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", text, re.M)
    assert sections[0] == ("Unreleased", "")
    assert sections[1][0] == PROJECT["version"]
    assert all(date for _, date in sections[1:])
    for name, _ in sections:
        assert re.search(rf"^\[{re.escape(name)}\]: https://", text, re.M), name


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "CODE_OF_CONDUCT.md", "SECURITY.md"])
def test_links_and_make_targets_exist(name):
    text = (ROOT / name).read_text()
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert "://" in link or (ROOT / link.partition("#")[0]).exists(), link
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)", "\n".join(re.findall(r"`+[^`]+`+", text))):
        assert re.search(f"^{target}:", makefile, re.M), target


def test_the_table_of_resolved_extras_fits_pyproject():
    """`make resolve` writes the table; a change of the bounds must be followed by another."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| (3\.\d+) \| `(\w+)` \| ([\d.]+) \| ([\d.]+) \|", text, re.M)
    assert {row[:2] for row in rows} == {
        (python, extra) for python in resolve_extras.PYTHONS for extra in resolve_extras.EXTRAS
    }
    needs = [Requirement(need) for need in PROJECT["dependencies"]]
    for python, _, jax, flax in rows:
        for need in needs:
            if need.marker and not need.marker.evaluate({"python_version": python}):
                continue
            if need.name in ("jax", "flax"):
                assert need.specifier.contains({"jax": jax, "flax": flax}[need.name]), need
