"""`deeplab-jax plan` as a user types it, run in this process, mostly with a fake compiler."""

import dataclasses
import functools
import json
import os

import jax
import pytest

from conftest import ROOT
from deeplab_jax.plan import plan
from deeplab_jax.plan.collectives import Collective
from deeplab_jax.plan.plan import Memory, Plan
from deeplab_jax.utils.errors import UserError

SHAPES = ROOT / "configs" / "shapes.py"
GIB = 2**30


@pytest.fixture
def command(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "prepare", lambda: None)
    monkeypatch.setattr(plan, "topology_devices", lambda topology: jax.devices())
    return functools.partial(command, "plan")


@pytest.fixture
def compiler(monkeypatch):
    """A fake compiler: 1 GiB for the state, and 1 GiB of temporaries per four images of a chip."""
    asked = []

    def make_plan(config, architecture, topology, log):
        asked.append(config)
        log("compiling")
        batch = config.train.batch_size
        fields = {
            "topology": topology,
            "mesh": (topology.num_chips, 1),
            "batch_size": batch,
            "hbm_bytes": topology.chip.hbm_bytes,
            "convolution_flops": 2e12,
            "compile_seconds": 7.0,
        }
        temporaries = batch // topology.num_chips * GIB // 4
        if temporaries > 1.5 * topology.chip.hbm_bytes:
            return Plan(**fields, refusal="Ran out of memory: so much exceeds so little.")
        memory = Memory(GIB, GIB, GIB, temporaries, 0)
        return Plan(
            **fields,
            memory=memory,
            flops=1.97e12,
            accessed_bytes=8.19e9,
            collectives=(
                Collective("all-reduce", 8, 12, 40 * 10**6),
                Collective("all-reduce", 2, 3, 10**6, between_slices=True),
            ),
        )

    monkeypatch.setattr(plan, "make_plan", make_plan)
    return asked


def test_a_plan_is_printed_and_written(command, compiler):
    settings = ("--set", "train.batch_size=64", "--set", "model.dtype=bfloat16")
    code, out, err = command(SHAPES, "--topology", "v5e:2x4", *settings, "--json", "plan.json")
    assert code == 0
    assert "v5e:2x4: fits; compiled in 7 s" in err
    (config,) = compiler
    assert (config.train.batch_size, config.model.dtype) == (64, "bfloat16")
    with open("plan.json") as file:
        values = json.load(file)
    assert (values["topology"], values["devices"], values["batch_size"]) == ("v5e:2x4", 8, 64)
    assert values["bytes_per_device"] == 3 * GIB
    assert values["hbm_bytes"] == int(15.75 * GIB)
    assert values["flops_per_device"] == 1.97e12
    assert values["fits"] is True
    assert values["collectives"][0] == {
        "kind": "all-reduce",
        "group_size": 8,
        "count": 12,
        "bytes": 40_000_000,
        "between_slices": False,
        "sent_bytes": 70e6,
    }
    assert values["roofline"]["step_seconds"] == pytest.approx(0.01)
    assert values["roofline"]["images_per_second"] == pytest.approx(6400)
    lines = out.splitlines()
    shown = {line[:28].strip(): line[28:].strip() for line in lines}
    assert shown["batch"] == "64, 8 a chip"
    assert shown["memory a chip: total"] == "3.00 GiB"
    assert shown["memory a chip: limit"].startswith("15.75 GiB of 16 GB")
    assert "fits, 19 % used" in shown["memory a chip: limit"]
    assert "arithmetic 10.00 ms at 197 TFLOP/s, memory 10.00 ms at 819 GB/s" in out
    assert shown["a step, estimated"] == (
        "10.00 ms, bound by compute: 6400 images/s; at most 6400 if all memory traffic stayed in "
        "the chips"
    )
    assert "not a measurement" in out
    tables = [line.split() for line in lines if line.startswith("all-reduce")]
    assert tables[0] == ["all-reduce", "8", "12", "40.000", "70.000"]
    assert tables[1] == ["all-reduce", "between", "slices", "2", "3", "1.000", "1.000"]


def test_only_json_on_stdout(command, compiler):
    code, out, err = command(SHAPES, "--topology", "v5e:2x4", "--json", "-")
    assert code == 0
    assert json.loads(out)["peaks"]["interconnect_bandwidth"] == 100e9
    assert "memory a chip: total" in err


def test_what_does_not_fit_is_exit_code_1(command, compiler):
    settings = ("--set", "train.batch_size=512")
    code, out, err = command(SHAPES, "--topology", "v5e:2x4", *settings, "--json", "plan.json")
    assert code == 1
    assert "does not fit, 108 % used" in out
    assert "does not fit; compiled in" in err
    with open("plan.json") as file:
        assert json.load(file)["fits"] is False


def test_what_the_compiler_refuses_is_exit_code_1(command, compiler):
    settings = ("--set", "train.batch_size=4096")
    code, out, _ = command(SHAPES, "--topology", "v5e:2x4", *settings, "--json", "plan.json")
    assert code == 1
    assert "the compiler says: Ran out of memory: so much exceeds so little." in out
    with open("plan.json") as file:
        values = json.load(file)
    assert (values["bytes_per_device"], values["roofline"]) == (None, None)


@pytest.mark.parametrize(
    ("batch", "accumulate", "best"), [(8, 1, 8 * 59), (8192, 1, 8 * 59), (24, 3, 8 * 57)]
)
def test_find_batch(command, compiler, batch, accumulate, best):
    settings = (f"train.batch_size={batch}", f"optimizer.accumulate={accumulate}")
    flags = [part for setting in settings for part in ("--set", setting)]
    code, out, err = command(SHAPES, "--topology", "v5e:2x4", *flags, "--find-batch")
    assert code == 0
    assert f"batch                       {best}, {best // 8} a chip" in out
    tried = [config.train.batch_size for config in compiler]
    assert len(tried) == len(set(tried)) == err.count("compiled in")
    assert best in tried
    assert best + 8 * accumulate in tried
    assert len(tried) <= 12


def test_find_batch_where_none_fits(command, compiler, monkeypatch):
    make_plan = plan.make_plan

    def too_small(*arguments):
        return dataclasses.replace(make_plan(*arguments), hbm_bytes=GIB)

    monkeypatch.setattr(plan, "make_plan", too_small)
    code, out, _ = command(SHAPES, "--topology", "v5e:2x4", "--find-batch")
    assert code == 1
    assert "batch                       8, 1 a chip" in out
    assert "does not fit" in out


def test_a_real_compilation_for_the_devices_here(command, monkeypatch):
    settings = (
        *("model.architecture=paper_resnet18", "model.width=0.125", "train.batch_size=8"),
        *("data.crop_size=17", "optimizer.momentum=0"),
    )
    flags = [part for setting in settings for part in ("--set", setting)]
    code, out, err = command(SHAPES, "--topology", "v5e:2x4", *flags, "--json", "-")
    assert code == 0
    assert err.startswith("batch 8 of paper_resnet18 for v5e:2x4: compiling; ")
    values = json.loads(out)
    assert values["mesh"] == {"data": 8, "space": 1}
    assert {one["kind"] for one in values["collectives"]} == {"all-reduce"}
    assert 0 < values["bytes_per_device"] < 10e6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--topology", "v9:4x4"), "--topology must be a chip and the shape of a slice"),
        (("--topology", "v5e:4x4", "--slices", 0), "--slices must be 1 or more"),
        (("--topology", "v5e:4x4", "--set", "train.batchsize=3"), "nearest: train.batch_size"),
        (("--topology", "v5e:4x4", "--set", "train.batch_size"), "a setting is FIELD=VALUE"),
        (
            ("--topology", "v5e:4x4", "--set", "train.batch_size=many"),
            "config.train.batch_size must be a whole number, got 'many'",
        ),
        (("--topology", "v5e:4x4", "--set", "model.output_stride=12"), "must be 8, 16 or 32"),
        (("--topology", "v5e:2x4", "--set", "train.batch_size=12"), "nearest that works: 8 or 16"),
        (("--topology", "v5e:4x4", "--json", "plan.txt"), "--json must be a file that ends in"),
    ],
)
def test_mistakes_are_exit_code_2(command, arguments, message):
    code, out, err = command(SHAPES, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err


def test_a_config_that_leaves_its_classes_to_its_data(command, compiler):
    folder = ROOT / "configs" / "folder.py"
    code, _, err = command(folder, "--topology", "v5e:2x4")
    assert code == 2
    assert "give --num-classes" in err
    assert command(folder, "--topology", "v5e:2x4", "--num-classes", 4)[0] == 0
    assert command(folder, "--topology", "v5e:2x4", "--set", "model.num_classes=4")[0] == 0
    assert len(compiler) == 2


def test_no_device_and_no_network_is_touched(monkeypatch):
    updates = {}
    monkeypatch.setattr(jax.config, "update", lambda name, value: updates.update({name: value}))
    plan.prepare()
    assert updates["jax_platforms"] == "cpu"
    for name in plan._LIBTPU:
        monkeypatch.delenv(name, raising=False)
    from jax.experimental import topologies

    def describe(*_, **__):
        assert os.environ["TPU_SKIP_MDS_QUERY"] == "1"
        raise RuntimeError("not installed")

    monkeypatch.setattr(topologies, "get_topology_desc", describe)
    from deeplab_jax.plan import chips

    with pytest.raises(UserError, match="not installed"):
        plan.topology_devices(chips.parse("v5e:4x4"))
