"""Receipts: digests, what is written, and runs that stop, resume or have several devices."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from deeplab_jax.distributed import mesh as mesh_lib
from deeplab_jax.training import receipt
from deeplab_jax.training.state import abstract_state, shardings_of
from deeplab_jax.training.train import first_state, train
from deeplab_jax.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("shared_steps")
MASK = np.uint64(2**32 - 1)


def plain_digest(words):
    """The digest of a row of words in 64-bit integers of NumPy."""
    words = np.asarray(words, np.uint64).ravel()
    position = np.arange(words.size, dtype=np.uint64)
    mixed = words ^ (position * 0x9E3779B1 & MASK)
    mixed = (mixed ^ mixed >> 16) * 0x85EBCA6B & MASK
    mixed = (mixed ^ mixed >> 13) * 0xC2B2AE35 & MASK
    mixed ^= mixed >> 16
    weighted = mixed * (2 * position + 1) & MASK
    return [int(mixed.sum() & MASK), int(weighted.sum() & MASK)]


def noise(*shape):
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("channels", [1, 3, 4, 7])
def test_digest_of_images_is_that_of_plain_integers(channels):
    image, label = noise(2, 3, 5, channels), noise(2, 3, 5)
    found = receipt.digest_images(jnp.asarray(image), jnp.asarray(label))
    planes = np.concatenate([label[..., None], image], axis=-1)
    planes = np.pad(planes, ((0, 0), (0, 0), (0, 0), (0, -planes.shape[-1] % 4)))
    words = planes.view("<u4").reshape(2, -1).tolist()
    assert found.tolist() == [plain_digest(row) for row in words]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
@pytest.mark.parametrize("shape", [(), (3, 4)])
def test_digest_of_an_array_is_that_of_its_bits(dtype, shape):
    array = jnp.asarray(noise(*shape, 1).reshape(shape)).astype(dtype)
    size = array.dtype.itemsize
    words = np.frombuffer(np.asarray(array).tobytes(), f"<u{size}").tolist()
    assert receipt.digest_array(array).tolist() == plain_digest(words)


def test_digests_tell_signs_places_and_flipped_bits_apart():
    words = [np.zeros(20, np.uint32)]
    for index in range(20):
        for bit in range(32):
            words.append(words[0].copy())
            words[-1][index] ^= np.uint32(1 << bit)
    signs = words[0].copy()
    signs[:2] = np.float32(-0.0).view(np.uint32)  # the differences cancel in a plain sum
    swapped = [np.arange(20, dtype=np.uint32), np.arange(20, dtype=np.uint32)]
    swapped[1][[3, 4]] = 4, 3
    digests = receipt.digest_rows(jnp.asarray(np.stack([*words, signs, *swapped])))
    for lane in digests.T:
        assert len(set(lane.tolist())) == 1 + 20 * 32 + 3


@pytest.mark.parametrize(("data", "space"), [(4, 1), (2, 2), (1, 4)])
def test_digests_do_not_depend_on_the_mesh(data, space):
    config = tiny.short_config()
    rows = {"image": noise(4, 33, 9, 3), "label": noise(4, 33, 9)}
    digests = []
    for config.mesh.data, config.mesh.space in ((1, 1), (data, space)):
        mesh = mesh_lib.make_mesh(config.mesh)
        batch = mesh_lib.to_global(rows, mesh, 4)
        digests.append(receipt.spell(receipt.batch_digester(33, mesh)(batch)))
    assert digests[0] == digests[1]
    assert len({digests[0][i : i + 16] for i in range(0, 64, 16)}) == 4


def test_digests_of_a_sharded_state_are_those_of_one_device():
    config = tiny.short_config()
    found = []
    for config.mesh.data, config.mesh.fully_sharded in ((1, False), (4, True)):
        run = tiny.Run(config)
        state = jax.device_get(receipt.digest_state(run.start(), run.mesh))
        found.append({name: receipt.spell(digest) for name, digest in state.items()})
    assert found[0] == found[1]
    assert "params/backbone.layer1.0.conv1.kernel" in found[0]


_SHARDED = """
import types, jax, jax.numpy as jnp
jax.config.update("jax_num_cpu_devices", 2)
from deeplab_jax.config import MeshConfig
from deeplab_jax.distributed import mesh as mesh_lib
from deeplab_jax.training import receipt
mesh = mesh_lib.make_mesh(MeshConfig(fully_sharded=True))
arrays = {str(number): jnp.ones((2, 100_000)) for number in range(100)}
arrays = mesh_lib.device_put(arrays, mesh_lib.shardings(arrays, mesh, fully_sharded=True))
variables = types.SimpleNamespace(params=arrays, batch_stats={})
state = types.SimpleNamespace(variables=variables, opt_state={}, ema_params=None)
print(len(jax.device_get(receipt.digest_state(state, mesh))))
"""


def test_digests_of_a_sharded_state_do_not_wait_for_each_other_on_cpus():
    # In a process of its own with as few threads as devices; this one has more.
    command = [sys.executable, "-c", _SHARDED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout == "100\n", done.stderr[-2000:]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    train(tiny.short_config(), workdir)
    return workdir


def test_lines_have_the_bits_of_the_steps(whole):
    read = receipt.read(whole)
    run = tiny.Run(tiny.short_config())
    shardings = shardings_of(abstract_state(run.config, run.model, run.mesh))
    state = first_state(run.config, run.model, shardings, print)
    for step, batch in enumerate(run.batches(4), start=1):
        state, metrics = run.step(state, batch)
        expected = {
            name: np.asarray(value).view(np.uint32).item().to_bytes(4).hex()
            for name, value in metrics.items()
        }
        digests = receipt.digest_images(batch["image"], batch["label"])
        expected["batch"] = dict(enumerate(map(receipt.spell, digests)))
        if step % 2 == 0:
            found = jax.device_get(receipt.named_arrays(state))
            expected["state"] = {
                name: "".join(f"{sum:08x}" for sum in plain_digest(array.ravel().view(np.uint32)))
                for name, array in found.items()
            }
        assert read.steps[step] == expected
    assert read.steps_with("batch") == [1, 2, 3, 4]
    assert read.steps_with("state") == [0, 2, 4]
    (start,) = read.starts
    assert start["step"] == 0
    assert start["versions"]["jax"] == jax.__version__
    assert start["config"]["data.crop_size"] == [33]
    assert start["data"]["examples in an epoch"] == 24


def test_a_run_without_a_receipt_has_the_same_bits(whole, tmp_path):
    train(tiny.short_config(train__receipt_every=0), tmp_path)
    assert not (tmp_path / receipt.FILE).exists()
    ours, theirs = tiny.saved_state(tmp_path), tiny.saved_state(whole)
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_states_are_digested_every_few_steps(tmp_path):
    train(tiny.short_config(train__receipt_every=3), tmp_path)
    assert receipt.read(tmp_path).steps_with("state") == [0, 2, 3, 4]


def test_a_resumed_run_goes_on_with_its_receipt(whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    path = tmp_path / receipt.FILE
    path.write_text(path.read_text()[:-100])  # as a kill leaves it
    train(tiny.short_config(), tmp_path)
    resumed, once = receipt.read(tmp_path), receipt.read(whole)
    assert resumed.steps == once.steps
    assert [start["step"] for start in resumed.starts] == [0, 2]
    assert resumed.start_of(2)["step"] == 0
    assert resumed.start_of(3)["step"] == 2


def test_a_finished_run_that_runs_again_leaves_its_receipt(whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    before = (tmp_path / receipt.FILE).read_bytes()
    train(tiny.short_config(), tmp_path)
    assert (tmp_path / receipt.FILE).read_bytes() == before


def test_a_loss_that_is_not_finite_is_in_the_receipt(tmp_path):
    with pytest.raises(UserError, match="is not finite"):
        train(tiny.short_config(optimizer__learning_rate=1e30), tmp_path)
    last = max(receipt.read(tmp_path).steps.items())[1]
    assert not np.isfinite(np.array(int(last["loss"], 16), np.uint32).view(np.float32))


def test_receipts_that_cannot_be_read(whole, tmp_path):
    with pytest.raises(UserError, match=r"holds no receipt\.jsonl"):
        receipt.read(tmp_path)
    path = tmp_path / receipt.FILE
    path.write_text("")
    with pytest.raises(UserError, match="is empty: the run was stopped"):
        receipt.read(path)
    path.write_text('{"step": 1, "loss": 0.5}\n')  # metrics.jsonl
    with pytest.raises(
        UserError, match=r"line 1, is no line of a receipt: .* begins with the start"
    ):
        receipt.read(path)


@pytest.mark.parametrize(
    ("number", "fields", "message"),
    [
        (0, {"receipt": 99}, "has format 99, and this version"),
        (0, {"config": {"seed": "x"}}, "train.batch_size"),
        (0, {"versions": []}, "facts of config, versions, data, devices"),
        (1, {"state": "0" * 16}, "state has 16 digits, for "),
        (1, {"step": "0"}, "'str' object"),
        (2, {"loss": "0"}, "loss has 1 digits"),
        (2, {"loss": "x" * 8}, "invalid literal"),
        (2, {"grad_norm": None}, "can.t convert"),
        (2, {"batch": 5}, "can.t convert"),
    ],
)
def test_receipts_that_were_changed_by_hand(whole, tmp_path, number, fields, message):
    path = tmp_path / receipt.FILE
    lines = (whole / receipt.FILE).read_text().splitlines()
    lines[number] = json.dumps(json.loads(lines[number]) | fields)
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=f"line {number + 1}, is no line of a receipt: .*{message}"):
        receipt.read(path)


def test_a_receipt_cut_short_is_read_up_to_there(whole, tmp_path):
    path = tmp_path / receipt.FILE
    path.write_text((whole / receipt.FILE).read_text()[:-100])
    read = receipt.read(path)
    assert read.steps_with("state") == [0, 2]
    assert "is cut short" in read.notes[0]
