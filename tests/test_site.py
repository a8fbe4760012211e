"""The documentation site: built strictly, and crawled."""

import html.parser
import os
import re
import subprocess
import sys
import tomllib
import urllib.parse

import pytest

import deeplab_jax as dl
from conftest import ROOT
from deeplab_jax.config import IMAGE_LOSSES, LOGGERS, PIXEL_LOSSES
from deeplab_jax.data import DATASETS
from deeplab_jax.evaluation.protocols import PROTOCOLS
from deeplab_jax.models.architecture import ARCHITECTURES, BACKBONES, HEADS
from deeplab_jax.weights.families import FAMILIES

for package in ("mkdocs", "material", "mkdocstrings", "mkdocs_jupyter"):
    pytest.importorskip(package, reason="the site needs `pip install -e '.[docs]'`")

with open(ROOT / "pyproject.toml", "rb") as file:
    URLS = tomllib.load(file)["project"]["urls"]
REGISTRIES = {"architectures": ARCHITECTURES, "backbones": BACKBONES, "heads": HEADS}
REGISTRIES |= {"pixel_losses": PIXEL_LOSSES, "image_losses": IMAGE_LOSSES, "datasets": DATASETS}
REGISTRIES |= {"protocols": PROTOCOLS, "families": FAMILIES, "loggers": LOGGERS}


def mkdocs(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )


class Page(html.parser.HTMLParser):
    """A page: its ids, its links, and the addresses that a browser fetches."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.fetched, self.text = set(), set(), set(), path.read_text()
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids.add(found.get("id"))
        if tag == "a":
            self.links.add(found.get("href"))
        elif tag != "link" or found["rel"] not in ("canonical", "next", "prev"):
            self.fetched |= {found.get("src"), found.get("data"), found.get("href")}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site, and its pages."""
    folder = tmp_path_factory.mktemp("site")
    done = mkdocs("--site-dir", folder)
    assert done.returncode == 0, done.stderr
    pages = {path: Page(path) for path in folder.rglob("*.html")}
    assert len(pages) > 25
    return folder, pages


def local(addresses):
    return {each for each in addresses if each and not re.match(r"\w+:|//", each)}


def test_no_internal_link_is_dead(site):
    folder, pages = site
    for path, page in pages.items():
        for address in local(page.links | page.fetched):
            # 404.html has addresses from the root of the server.
            place = urllib.parse.unquote(address).removeprefix("/deeplab_jax")
            name, _, anchor = place.partition("#")
            start = folder if name.startswith("/") else path.parent
            file = (start / name.lstrip("/")).resolve() if name else path
            file = file / "index.html" if file.is_dir() else file
            assert file.is_file(), f"{path}: {address}"
            assert not anchor or anchor in pages[file].ids, f"{path}: {address}"
    assert sum(len(page.links) for page in pages.values()) > 1000


def test_pages_load_nothing_from_other_servers(site):
    folder, pages = site
    for path, page in pages.items():
        others = page.fetched - local(page.fetched) - {None, ""}
        assert all(each.startswith("data:") for each in others), (path, others)
        assert 'class="mermaid"' not in page.text, path  # drawn by a script from elsewhere
    for path in folder.rglob("*.css"):
        assert not re.search(r"(url\(|@import) *[\"']?(https?:)?//", path.read_text()), path


def test_markdown_is_rendered(site):
    """GitHub begins a list or a table within a paragraph, and draws formulas; the site does not."""
    for path, page in site[1].items():
        for words in re.findall("<p>(.*?)</p>", page.text, re.S):
            words = re.sub("<code>.*?</code>", "", words, flags=re.S)
            assert not re.search(r"^(- |\* |\|)|```|\$\$", words, re.M), (path, words)


def test_every_public_name_has_an_entry(site):
    ids = set().union(*(page.ids for page in site[1].values()))
    assert {f"deeplab_jax.{name}" for name in dl.__all__} <= ids
    methods = [name for name in vars(dl.Segmenter) if not name.startswith("_")]
    assert {f"deeplab_jax.Segmenter.{name}" for name in methods} <= ids


@pytest.mark.parametrize("kind", REGISTRIES)
def test_each_registry_is_listed(site, kind):
    ids = site[1][site[0] / "api" / "registries" / "index.html"].ids - {None}
    listed = {name.partition(".")[2] for name in ids if name.startswith(f"{kind}.")}
    assert listed == set(REGISTRIES[kind])


def test_addresses_are_those_of_the_project(site):
    text = (ROOT / "mkdocs.yml").read_text()
    assert f"\nrepo_url: {URLS['Repository']}\n" in text
    assert f"\nsite_url: {URLS['Documentation']}/\n" in text
    for path, page in site[1].items():
        for address in filter(None, page.links):
            kind, _, name = address.removeprefix(f"{URLS['Repository']}/").partition("/main/")
            if kind in ("blob", "tree"):
                assert (ROOT / name.partition("#")[0]).exists(), f"{path.parent.name}: {address}"


MISTAKES = {
    "[a](gone.md)": "gone.md",
    "[a](index.md#gone)": "#gone",
    "[a](../benchmarks/gone.py)": "benchmarks/gone.py",
    "[a][deeplab_jax.gone]": "deeplab_jax.gone",
}
UNKNOWN = "::: deeplab_jax.gone"  # ends the build by itself


@pytest.mark.parametrize("texts", [["[a](index.md#title)"], [*MISTAKES], [UNKNOWN]])
def test_a_mistake_fails_the_build(tmp_path, texts):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("\n\n".join(["# Title", *texts, ""]))
    settings = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[0]
    settings = settings.replace("docs/", f"{ROOT}/docs/") + "\nnot_in_nav: '*'\n"
    (tmp_path / "mkdocs.yml").write_text(settings)
    done = mkdocs("--config-file", tmp_path / "mkdocs.yml")
    expected = [(MISTAKES | {UNKNOWN: "deeplab_jax.gone"}).get(text) for text in texts]
    assert (done.returncode != 0) == any(expected), done.stderr
    # Each warning fails a strict build.
    found = [line for line in done.stderr.splitlines() if line.startswith(("WARNING", "ERROR"))]
    for words in filter(None, expected):
        assert any(words in line for line in found), done.stderr
