"""Updates the tables of docs/paper.md from configs/paper.py.

python docs/paper_tables.py
"""

import importlib.util
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "paper.md"
HEADER = "| config | what | paper | ours |\n|---|---|---|---|\n"


def update_tables(page: str) -> str:
    """Returns the page with each table of configs generated from configs/paper.py."""
    spec = importlib.util.spec_from_file_location("paper", ROOT / "configs" / "paper.py")
    assert spec is not None
    assert spec.loader is not None
    paper = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(paper)

    def table(match: re.Match[str]) -> str:
        number = match[1]
        lines = (
            f"| `{name}` | {row.text} | {row.miou:.2f} | not run |\n"
            for name, row in paper.ROWS.items()
            if name.startswith(f"table{number}_")
        )
        return HEADER + "".join(lines)

    pattern = re.escape(HEADER) + r"(?:\| \[?`table(\d+)_.*\n)+"
    return re.sub(pattern, table, page)


if __name__ == "__main__":
    PAGE.write_text(update_tables(PAGE.read_text()))
