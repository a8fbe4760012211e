"""`deeplab-jax replay` and `deeplab-jax bisect`."""

import json
import re
import shutil

import pytest

import tiny
from deeplab_jax.training import receipt
from deeplab_jax.training.train import train

pytestmark = pytest.mark.usefixtures("shared_steps")


def get_config(seed=0):
    return tiny.short_config(seed=seed, train__steps=3, train__save_every=1, train__keep=9)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The workdirs of two runs of different seeds."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seed in (("a", 0), ("b", 1)):
        train(get_config(seed), folder / name)
    return folder / "a", folder / "b"


def test_replay_says_what_is_equal(runs, command, tmp_path):
    kept = tmp_path / "kept"
    code, out, _ = command(
        "replay", runs[0], "--steps=1:3", "--keep-batches", kept, "--json", tmp_path / "r.json"
    )
    assert code == 0
    assert "from checkpoint 1\nsteps 2 to 3 equal bit for bit: " in out
    assert {path.name for path in kept.iterdir()} == {"batch_00000002.npz", "batch_00000003.npz"}
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["equal"] is True
    assert (found["steps"], found["difference"], found["num_states"]) == ([2, 3], None, 3)


def test_replay_says_what_differs(runs, command, tmp_path):
    shutil.copytree(runs[0], tmp_path / "run")
    path = tmp_path / "run" / receipt.FILE
    lines = path.read_text().splitlines()
    number = next(i for i, line in enumerate(lines) if '"step": 2, "batch"' in line)
    line = json.loads(lines[number])
    lines[number] = json.dumps(line | {"batch": line["batch"][:16] + "f" * 16 + line["batch"][32:]})
    path.write_text("\n".join(lines))
    code, out, _ = command("replay", tmp_path / "run", "--from-start", "--json=-")
    assert code == 1
    found = json.loads(out)["difference"]
    assert (found["step"], found["what"], found["where"]) == (2, "batch", [1])
    code, out, _ = command("replay", tmp_path / "run", "--steps=0:2")
    assert "DIFFERS: the batch of step 2: 1 images, the first in row 1" in out
    assert re.search(r"\n  image \d+ of the epoch: shapes-train-\d+\n", out)
    assert "likely cause: nothing that a receipt records" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps=7"], "--steps must be FIRST:LAST, as 1000:1010 for the steps 1001 to 1010"),
        (["--steps=1:9"], "--steps 1:9 must be two of the steps that"),
        (["--steps=1:99999999999"], "must be two of the steps that"),
        (["--keep-batches=gs://bucket/kept"], "--keep-batches must be a folder on this machine"),
        (["--root=absent"], "absent"),
    ],
)
def test_replay_of_what_is_not_there(runs, command, arguments, message, tmp_path):
    if arguments == ["--root=absent"]:  # a generated data set has no root
        arguments, message = [], f"{tmp_path} holds no receipt.jsonl"
    run = runs[0] if arguments else tmp_path
    code, _, err = command("replay", run, *arguments)
    assert code == 2
    assert message in err


def test_bisect_says_what_differs(runs, command, tmp_path):
    code, out, _ = command("bisect", *runs, "--json", tmp_path / "d.json")
    assert code == 1
    assert "A | B:\n  config.seed: 0 | 1\n" in out
    assert "FIRST DIFFERENCE, A | B: the initial state: " in out
    assert "then the batch of step 1: 8 images, the first in row 0" in out
    assert " pixels differ; the first at x " in out
    assert out.endswith("likely cause:\n  config.seed: 0 | 1\n")
    found = json.loads((tmp_path / "d.json").read_text())
    assert found["equal"] is False
    assert found["difference"]["what"] == "state"
    assert found["image"]["images"][0]["name"].startswith("shapes-train-")


def test_bisect_of_a_run_and_itself(runs, command):
    code, out, _ = command("bisect", runs[0], runs[0] / receipt.FILE)
    assert code == 0
    assert "equal at the start\n\nEQUAL bit for bit: steps 1 to 3\n" in out


def test_bisect_of_what_is_no_run(runs, command, tmp_path):
    code, _, err = command("bisect", runs[0], runs[1] / "metrics.jsonl")
    assert code == 2
    assert "metrics.jsonl, line 1, is no line of a receipt" in err
    code, _, err = command("bisect", runs[0], tmp_path)
    assert code == 2
    assert f"{tmp_path} holds no receipt.jsonl" in err
