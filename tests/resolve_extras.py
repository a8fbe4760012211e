"""Resolves the CUDA and TPU extras on each Python, and prints the table of CONTRIBUTING.md.

uv asks the package index, and nothing is installed. Ends with 1 if an extra does not resolve.
"""

import itertools
import pathlib
import re
import subprocess
import sys

PYTHONS = ("3.11", "3.12", "3.13")
# The packages of each extra whose versions the table shows.
EXTRAS = {
    "cuda12": ("jax-cuda12-plugin", "nvidia-cuda-runtime-cu12", "nvidia-cudnn-cu12"),
    "cuda13": ("jax-cuda13-plugin", "nvidia-cuda-runtime", "nvidia-cudnn-cu13"),
    "tpu": ("libtpu",),
}


def resolve(python: str, extra: str) -> dict[str, str]:
    """Returns the version of each package."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-annotate"]
    where = ["--python-version", python, "--python-platform", "x86_64-manylinux_2_31"]
    project = pathlib.Path(__file__).parents[1] / "pyproject.toml"
    done = subprocess.run(
        [*command, *where, "--extra", extra, project], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{extra} on Python {python}:\n{done.stderr}")
    return dict(re.findall(r"^([\w-]+)(?:\[[\w,-]+\])?==(\S+)", done.stdout, re.M))


def main() -> None:
    print("| Python | extra | jax | flax | brings |\n|---|---|---|---|---|")
    for python, (extra, shown) in itertools.product(PYTHONS, EXTRAS.items()):
        versions = resolve(python, extra)
        brings = ", ".join(f"{name} {versions[name]}" for name in shown)
        print(f"| {python} | `{extra}` | {versions['jax']} | {versions['flax']} | {brings} |")


if __name__ == "__main__":
    main()
