"""docs/cracks.md: what its commands print for the set that docs/make_cracks.py draws."""

import pathlib
import runpy

ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_the_check_finds_what_the_page_shows(tmp_path, command):
    folder = tmp_path / "cracks"
    runpy.run_path(str(ROOT / "docs" / "make_cracks.py"))["main"](folder)
    code, out, _ = command("data", "check", folder, "--write-classes")
    assert code == 0
    page = (ROOT / "docs" / "cracks.md").read_text()
    found = next(line for line in out.splitlines() if line.startswith("note: found"))
    advice = next(line for line in out.splitlines() if line.startswith("advice imbalance"))
    assert f"\n{found}\n{(folder / 'classes.txt').read_text()}" in page
    assert advice.partition(":")[0] == "advice imbalance (1)"
    assert page.count(advice[: advice.index(")", 22) + 1]) == 1
