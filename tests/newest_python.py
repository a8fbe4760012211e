"""Prints the newest Python on this machine, other than the one that runs this, for CI.

Prints nothing if there is none that the package supports.
"""

import os
import pathlib
import shutil
import subprocess
import sys

VERSIONS = ["3.13", "3.12", "3.11"]  # those that the package is tested on, the newest first


def find() -> str | None:
    root = pathlib.Path(os.environ.get("PYENV_ROOT", pathlib.Path.home() / ".pyenv"))
    for version in VERSIONS:
        if version == "{}.{}".format(*sys.version_info):
            continue
        name = f"python{version}"
        on_path = shutil.which(name)
        for command in [*root.glob(f"versions/{version}.*/bin/{name}"), *filter(None, [on_path])]:
            # A shim of pyenv for a version that is not active is on the path, and fails.
            done = subprocess.run([command, "-c", "import venv, ensurepip"], capture_output=True)
            if done.returncode == 0:
                return str(command)
    return None


if __name__ == "__main__":
    print(find() or "")
