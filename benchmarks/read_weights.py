"""Measures time and memory of reading weights, compared with PyTorch and safetensors.

The file is torchvision's DeepLabv3 with ResNet-101, in the page cache: as a `.pth` of both formats,
as `.safetensors`, and as a folder of three shards with an index. Each reading is a new
process, and the readers alternate. A reading ends when the bytes of all arrays were accessed,
because creating a memory map reads nothing. Memory is the growth of the process's peak, including
mapped pages of the file, after all modules are imported. Needs the `test` extra:

    python benchmarks/read_weights.py --machine "2 cores ..." --json results.json
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
REPEATS = 7
MIB = 2**20


def read_with_ours(path: str) -> tuple[float, float]:
    """Returns the seconds to read the arrays, and to read and sum them."""
    import numpy as np

    from deeplab_jax.weights.hub_folder import read_file_or_folder

    reset_peak()
    start = time.perf_counter()
    arrays = read_file_or_folder(pathlib.Path(path)).arrays
    read = time.perf_counter() - start
    sum(int(np.ravel(array, "K").view(np.uint8)[::64].sum()) for array in arrays.values())
    return read, time.perf_counter() - start


def read_with_theirs(path: str) -> tuple[float, float]:
    import safetensors.torch
    import torch

    torch.set_num_threads(1)
    reset_peak()
    start = time.perf_counter()
    if path.endswith(".pth"):
        arrays = torch.load(path, weights_only=True)
    else:
        files = sorted(pathlib.Path(path).glob("*.safetensors")) or [path]
        arrays = {k: v for file in files for k, v in safetensors.torch.load_file(file).items()}
    read = time.perf_counter() - start
    sum(int(array.reshape(-1).view(torch.uint8).numpy()[::64].sum()) for array in arrays.values())
    return read, time.perf_counter() - start


READERS = {"deeplab_jax": read_with_ours, "theirs": read_with_theirs}


def reset_peak() -> None:
    """Resets the peak of the resident memory, and stores its new value as `reset_peak.before`."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    reset_peak.before = peak()  # type: ignore[attr-defined]


def peak() -> float:
    """Returns the peak of the resident memory, bytes."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return float(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(reader: str, path: str) -> dict[str, float]:
    """Measures one reading in this process."""
    read, summed = READERS[reader](path)
    used = peak() - reset_peak.before  # type: ignore[attr-defined]
    return {
        "read_seconds": read,
        "read_and_sum_seconds": summed,
        "memory_per_file_size": used / size_of(pathlib.Path(path)),
    }


def size_of(path: pathlib.Path) -> int:
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def write_files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    sys.path.insert(0, str(ROOT / "tests"))
    import safetensors.torch

    from torch_reference import segmentation_model, torch

    state_dict = segmentation_model("deeplabv3_resnet101", aux=True).state_dict()
    names = {"zip": "zip.pth", "legacy": "legacy.pth", "safetensors": "one.safetensors"}
    paths = {name: folder / file for name, file in names.items()} | {"shards": folder / "shards"}
    torch.save(state_dict, paths["zip"])
    torch.save(state_dict, paths["legacy"], _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(state_dict, paths["safetensors"])
    paths["shards"].mkdir()
    shards = [list(state_dict)[index::3] for index in range(3)]
    weight_map = {}
    for index, shard in enumerate(shards, start=1):
        name = f"model-{index:05}-of-00003.safetensors"
        arrays = {key: state_dict[key] for key in shard}
        safetensors.torch.save_file(arrays, paths["shards"] / name)
        weight_map |= dict.fromkeys(shard, name)
    index_file = paths["shards"] / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"weight_map": weight_map}))
    return paths


def run(reader: str, path: pathlib.Path) -> dict[str, float]:
    command = [sys.executable, __file__, reader, str(path)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    return json.loads(output)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--machine", default="", help="description of this machine")
    parser.add_argument("--json", type=pathlib.Path, help="file to write the results to")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, path in write_files(pathlib.Path(folder)).items():
            for reader in READERS:  # not measured: fills the page cache
                run(reader, path)
            turns = [{reader: run(reader, path) for reader in READERS} for _ in range(REPEATS)]
            for reader in READERS:
                medians = {
                    key: round(statistics.median(turn[reader][key] for turn in turns), 4)
                    for key in turns[0][reader]
                }
                size = round(size_of(path) / MIB, 1)
                rows.append({"format": name, "mib": size, "reader": reader, **medians})
                print(json.dumps(rows[-1]))
    if arguments.json:
        versions = {
            name: importlib.metadata.version(name) for name in ("numpy", "safetensors", "torch")
        }
        result = {
            "date": datetime.date.today().isoformat(),
            "machine": arguments.machine,
            "versions": {"python": platform.python_version(), **versions},
            "repeats": REPEATS,
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] in [[reader] for reader in READERS]:  # one reading, in its own process
        print(json.dumps(measure(sys.argv[1], sys.argv[2])))
    else:
        main()
