"""Kills a run whose workdir is in a bucket, or takes the bucket away, and checks how it ends.

  PYTHONPATH=tests python -m benchmarks.bucket_kills --kills=20

The buckets are the stand-ins of the tests, on this machine: an emulator of Google Cloud Storage and
moto's S3. Each kill is a SIGKILL at a random moment; before every third attempt the local copy is
deleted, as on another host. Then, in another run, the server stops answering for `--outage` seconds
while a checkpoint is uploaded. The ends are compared with those of local runs. Prints one line a
kind of bucket; the results are in benchmarks/results/bucket_kills.json.
"""

import argparse
import json
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import time

import numpy as np

import bucket_servers
import tiny
from deeplab_jax.buckets import staging
from deeplab_jax.buckets.store import Store

FLAGS = ("--config.train.steps=40", "--config.train.eval_every=20", "--config.train.log_every=1")
LONG = ("--config.train.steps=4000", "--config.train.eval_every=0", "--config.train.save_every=100")
RESULTS = pathlib.Path(__file__).parent / "results" / "bucket_kills.json"


def kill_and_resume(address: str, cache: pathlib.Path, kills: int, seed: int, flags=FLAGS) -> dict:
    """Runs to the end with `kills` kills on the way; returns the number of attempts and steps."""
    rng = np.random.default_rng(seed)
    steps_seen, killed = [], 0
    while True:
        if killed % 3 == 2:
            for copy in (cache / "deeplab_jax" / "runs").rglob("process-0"):
                shutil.rmtree(copy)
        process = tiny.start_command(address, *flags)
        if killed == kills:
            tiny.finish(process)
            return {"attempts": killed + 1, "killed_after_step": steps_seen}
        step = 0
        if rng.random() < 0.25:
            time.sleep(rng.uniform(0, 8))  # somewhere in the start
        else:
            for _ in range(int(rng.integers(1, 4))):
                while (line := process.stderr.readline()) and not line.startswith("step "):
                    pass
                if line:
                    step = int(line.split()[1].split("/")[0])
            time.sleep(rng.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        steps_seen.append(step)
        killed += 1


def survive_outage(server: bucket_servers.Server, address: str, seconds: float) -> dict:
    """Freezes the server while a checkpoint is uploaded; returns which, and the last step."""
    process = tiny.start_command(address, *LONG)
    store = Store(address)
    while True:
        names = [name for name in store.list() if "/checkpoints/" in f"/{name}"]
        folders = {name.rpartition("checkpoints/")[2].split("/")[0] for name in names}
        marked = {name.split("/")[-2] for name in names if name.endswith("commit_success.txt")}
        if marked and folders - marked:
            break
    server.freeze()
    time.sleep(seconds)
    server.thaw()
    _, said = tiny.finish(process)
    steps = [
        int(line.split()[1].split("/")[0]) for line in said.splitlines() if line[:5] == "step "
    ]
    return {"uploading": sorted(folders - marked), "steps": max(steps)}


def end_state(address: str, folder: pathlib.Path) -> tuple[dict, list[dict]]:
    """The newest checkpoint's arrays, and the lines of metrics.jsonl, of a run in a bucket."""
    staging.stage(address, lambda name: "tensorboard" not in name, title="the run", into=folder)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return tiny.saved_state(folder), [json.loads(line) for line in lines]


def problems(address: str, whole: pathlib.Path, folder: pathlib.Path) -> list[str]:
    """What differs between the end of a run in a bucket and that of a local one."""
    state, metrics = end_state(address, folder)
    expected = tiny.saved_state(whole)
    found = [
        f"{name} differs"
        for name in sorted({*state, *expected})
        if name not in state or not np.array_equal(state[name], expected.get(name), equal_nan=True)
    ]
    lines = (whole / "metrics.jsonl").read_text().splitlines()
    wanted = [json.loads(line) for line in lines]

    def timeless(entries):
        names = ("images_per_second", "data_wait_share")
        return [{k: v for k, v in entry.items() if k not in names} for entry in entries]

    if timeless(metrics) != timeless(wanted):
        steps = [[entry["step"] for entry in entries] for entries in (metrics, wanted)]
        found.append(f"metrics.jsonl differs: {steps}")
    unfinished = [name for name in Store(address).list() if "orbax-checkpoint-tmp" in name]
    return found + unfinished


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--outage", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        top = pathlib.Path(scratch)
        tiny.finish(tiny.start_command(top / "whole", *FLAGS))
        tiny.finish(tiny.start_command(top / "long", *LONG))
        for scheme in ("gs", "s3"):
            server = bucket_servers.Server(scheme, top / scheme)
            os.environ |= server.environment | {"XDG_CACHE_HOME": str(top / f"{scheme}-cache")}
            address = f"{server.make_bucket()}/runs/a"
            cache = pathlib.Path(os.environ["XDG_CACHE_HOME"])
            begin = time.monotonic()
            result = kill_and_resume(address, cache, arguments.kills, arguments.seed)
            result["seconds"] = round(time.monotonic() - begin)
            result["differences"] = problems(address, top / "whole", top / f"{scheme}-end")
            begin, address = time.monotonic(), f"{server.make_bucket()}/runs/b"
            outage = survive_outage(server, address, arguments.outage)
            outage["seconds"] = round(time.monotonic() - begin)
            outage["differences"] = problems(address, top / "long", top / f"{scheme}-long")
            result["differences"] += outage["differences"]
            results[scheme] = result | {"outage": outage}
            print(scheme, json.dumps(results[scheme]), flush=True)
            server.kill()
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    sys.exit(any(result["differences"] for result in results.values()))


if __name__ == "__main__":
    main()
