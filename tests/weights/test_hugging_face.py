"""Models on Hugging Face's hub, as a server on this machine plays it."""

import errno
import json
import shutil
import sys

import numpy as np
import pytest
import safetensors.numpy

import deeplab_jax as dl
import tiny
from deeplab_jax.models.functional import FunctionalModel
from deeplab_jax.training import train
from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights import hub as names
from deeplab_jax.weights import hub_folder, hugging_face, initialize, saved_model
from hub_server import Hub, Repo, hub  # noqa: F401 because pytest finds the fixture by its name

NAME = "me/fox"
EXTRA = ("pytorch_model.bin", "optimizer.pt", "flax_model.msgpack", "model.safetensors.index.json")


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """A folder as `push` uploads it."""
    path = tmp_path_factory.mktemp("folder") / "fox"
    hub_folder.write(saved_model.read(model), path)
    return path


@pytest.fixture
def published(hub, folder):  # noqa: F811
    """A hub with this model, also in a subfolder, and with files that are not needed."""
    repo = hub.repos[NAME] = Repo()
    repo.add_folder(folder)
    repo.add_folder(folder, "small/")
    repo.files |= dict.fromkeys(EXTRA, b"not needed")
    return hub


@pytest.fixture
def logged_in(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", Hub.token)


@pytest.fixture
def no_waiting(monkeypatch):
    from huggingface_hub import file_download

    monkeypatch.setattr(file_download.time, "sleep", lambda _: None)


def files_below(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


# --- Reading -----------------------------------------------------------------------------------


def test_only_the_needed_files_are_downloaded_and_once(published, folder):
    for _ in range(2):
        found = names.find_weights(f"hf://{NAME}")
        assert files_below(found) == ["config.json", "model.safetensors"]
        for file in files_below(found):
            assert (found / file).read_bytes() == (folder / file).read_bytes()
        assert sorted(published.downloaded()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (f"hf://{NAME}/small", ["config.json", "model.safetensors"]),
        (f"hf://{NAME}@v1.0/small/", ["config.json", "model.safetensors"]),
        (f"hf://{NAME}@refs/pr/1", ["config.json", "model.safetensors"]),
        (f"hf://{NAME}@refs%2Fpr%2F1", ["config.json", "model.safetensors"]),
        (f"hf:/{NAME}", ["config.json", "model.safetensors"]),
        (f"hf://{NAME}/small/model.safetensors", ["config.json", "model.safetensors"]),
        (f"hf://{NAME}/optimizer.pt", ["optimizer.pt"]),
    ],
)
def test_revisions_folders_and_files(published, source, expected):
    found = names.find_weights(source)
    assert sorted(published.downloaded()) == expected
    assert found.exists()
    assert found.is_file() == source.endswith((".safetensors", ".pt"))


def test_a_known_repository_needs_no_prefix(hub, folder):  # noqa: F811
    name = names.REPOSITORIES[0]
    hub.repos[name] = Repo()
    hub.repos[name].add_folder(folder)
    assert files_below(names.find_weights(name)) == ["config.json", "model.safetensors"]


def test_shards(hub):  # noqa: F811
    shards = {f"pytorch_model-{i}.bin": bytes([i]) for i in (1, 2)}
    index = json.dumps({"weight_map": dict(zip("ab", shards, strict=True))})
    hub.repos[NAME] = Repo(
        {"pytorch_model.bin.index.json": index.encode(), "pytorch_model-3.bin": b"3", **shards}
    )
    found = names.find_weights(f"hf://{NAME}")
    assert files_below(found) == sorted([*shards, "pytorch_model.bin.index.json"])
    del hub.repos[NAME].files["pytorch_model-2.bin"]
    found = names.find_weights(f"hf://{NAME}")
    with pytest.raises(UserError, match=r"lacks pytorch_model-2.bin: 1 of the 2 files"):
        hub_folder.read(found)


def test_without_connection_the_cache_is_used(published, capsys):
    found = names.find_weights(f"hf://{NAME}@v1.0")
    published.close()
    assert names.find_weights(f"hf://{NAME}@v1.0") == found
    assert names.find_weights(f"hf://{NAME}@v1.0/model.safetensors").parent == found
    with pytest.raises(UserError, match="no connection to the hub"):
        names.find_weights(f"hf://{NAME}@main")


# --- Reading that fails ------------------------------------------------------------------------


def message_of(source, field=""):
    with pytest.raises(UserError) as error:
        names.find_weights(source, field)
    return str(error.value)


@pytest.mark.parametrize("offline", ["closed", "by setting"])
def test_offline_says_which_files_to_put_where(published, folder, offline, monkeypatch, tmp_path):
    if offline == "closed":
        published.close()
    else:
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = message_of(f"hf://{NAME}")
    assert f"hf://{NAME}: no connection to the hub" in message
    assert "config.json and the weights (model.safetensors or pytorch_model.bin" in message
    assert f"from https://huggingface.co/{NAME}/tree/main by other means into one folder" in message
    # Following the advice works.
    by_hand = tmp_path / "by hand"
    by_hand.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, by_hand)
    assert dl.load(by_hand).labels.names == ("background", "red fox", "bluebird")


def test_a_repository_that_does_not_exist(published, logged_in):
    message = message_of("hf://me/wolf", "config.init.path")
    assert message.startswith("config.init.path = 'hf://me/wolf': hf://me/wolf: there is no such")
    assert "https://huggingface.co/me/wolf/tree/main" in message


def test_a_private_repository(published, monkeypatch):
    published.repos[NAME].private = True
    assert "it is private" in (message := message_of(f"hf://{NAME}"))
    assert "`hf auth login`, or set HF_TOKEN" in message
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    assert "the token is missing, expired, or" in message_of(f"hf://{NAME}")
    monkeypatch.setenv("HF_TOKEN", Hub.token)
    assert names.find_weights(f"hf://{NAME}").is_dir()


@pytest.mark.parametrize("token", ["", Hub.token])
def test_a_gated_repository(published, monkeypatch, token):
    published.repos[NAME].gated = True
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    message = message_of(f"hf://{NAME}")
    assert "its owner grants access by request: ask at https://huggingface.co/me/fox" in message
    assert "HF_TOKEN" in message


def test_a_revision_that_does_not_exist(published):
    assert "no revision 'v2.0'; after the @" in message_of(f"hf://{NAME}@v2.0")


@pytest.mark.parametrize(
    "source", ["hf://fox", "hf://", "hf://me/fox@", "hf://@v1/fox", "hf://me//fox@v1"]
)
def test_names_of_another_form(hub, source):  # noqa: F811
    assert "must be hf://org/name" in message_of(source)
    assert not hub.requests


def test_a_name_that_no_repository_can_have(hub):  # noqa: F811
    assert "no name of a repository" in message_of("hf://me/fox--red")


def test_a_path_without_weights(published):
    message = message_of(f"hf://{NAME}/large")
    assert "no model.safetensors or pytorch_model.bin" in message
    published.repos[NAME].files = {"best.pth": b"", "README.md": b""}
    assert "it has best.pth: give one after the name" in message_of(f"hf://{NAME}")


def test_an_interrupted_download_is_resumed(published, folder, no_waiting, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)  # what it receives before a break
    published.break_after, published.num_breaks = 100_000, 2
    found = names.find_weights(f"hf://{NAME}")
    assert published.num_breaks == 0
    name = "model.safetensors"
    assert (found / name).read_bytes() == (folder / name).read_bytes()
    ranges = [each for _, path, each in published.requests if path.endswith(name) and each]
    assert ranges == ["bytes=100000-", "bytes=200000-"]


def test_half_a_file_is_never_used(published, folder, no_waiting, tmp_path):
    published.break_after, published.num_breaks = 0, 100
    published.repos[NAME].files["config.json"] = b""  # which does not break
    assert "no connection to the hub, or it broke off" in message_of(f"hf://{NAME}")
    assert not list((tmp_path / "hf_cache").rglob("*.safetensors"))
    published.num_breaks = 0
    found = names.find_weights(f"hf://{NAME}")
    name = "model.safetensors"
    assert (found / name).read_bytes() == (folder / name).read_bytes()


def test_a_full_disk(published, monkeypatch):
    from huggingface_hub import file_download

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(file_download, "http_get", fail)
    assert "the disk is full. Free some space, or set HF_HOME" in message_of(f"hf://{NAME}")


def test_without_the_extra(published, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = message_of(f"hf://{NAME}")
    assert "pip install 'deeplab-jax[hub]'" in message
    assert f"Or download https://huggingface.co/{NAME}/tree/main into a folder" in message


def test_training_starts_from_a_published_model(published, folder, model):
    expected = saved_model.read(model)
    config = tiny.get_config()
    functions = FunctionalModel.of(expected.architecture)
    for source in (f"hf://{NAME}/small/model.safetensors", f"hf://{NAME}", str(folder)):
        config.init.path = source
        found = initialize.init_variables(config, functions, lambda _: None)
        for ours, theirs in zip(found, expected.variables, strict=True):
            assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
        config.init.path, config.init.backbone = "", source
        found = initialize.init_variables(config, functions, lambda _: None)
        for name, array in expected.variables.params.items():
            assert np.array_equal(found.params[name], array) == name.startswith("backbone."), name
        config.init.backbone = ""


# --- Publishing --------------------------------------------------------------------------------


def test_a_pushed_model_has_the_same_logits(hub, logged_in, model, command):  # noqa: F811
    code, out, _ = command("push", model, NAME, "--license=mit", "--private")
    assert code == 0
    assert out == f"{hub.url}/{NAME}\n"
    repo = hub.repos[NAME]
    assert repo.private
    assert repo.messages == ["Upload a model of deeplab_jax"]
    assert set(repo.files) == {".gitattributes", "config.json", "model.safetensors", "README.md"}
    card = repo.files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: deeplab-jax\npipeline_tag: image-segmentation\n")
    assert "\nlicense: mit\n" in card
    assert f'dl.load("hf://{NAME}")' in card
    theirs, ours = dl.load(model), dl.load(f"hf://{NAME}")
    assert ours.info == json.loads(json.dumps(theirs.info))
    images = np.random.default_rng(0).normal(size=(2, 40, 33, 3)).astype(np.float32)
    assert np.array_equal(ours.logits(images), theirs.logits(images))


def test_convert_pushes_and_reads_back(hub, logged_in, model, command, tmp_path):  # noqa: F811
    code, out, _ = command("convert", model, f"hf://{NAME}")
    assert code == 0
    assert out.endswith(f"{hub.url}/{NAME}\n")
    assert command("convert", f"hf://{NAME}", tmp_path / "back", "--quiet")[0] == 0
    back, first = saved_model.read(tmp_path / "back"), saved_model.read(model)
    assert back.info == first.info
    for ours, theirs in zip(back.variables, first.variables, strict=True):
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_a_calibration_goes_with_its_checkpoint(hub, logged_in, model, tmp_path):  # noqa: F811
    calibrated = shutil.copytree(model, tmp_path / "calibrated")
    (calibrated / "calibration.json").write_text("its")
    hugging_face.push(saved_model.read(calibrated), NAME)
    dl.convert(f"hf://{NAME}", tmp_path / "back")
    for folder in (names.find_weights(f"hf://{NAME}"), tmp_path / "back"):
        assert (folder / "calibration.json").read_text() == "its"
    hugging_face.push(saved_model.read(model), NAME)
    assert "calibration.json" not in hub.repos[NAME].files


def test_commands_pass_the_name_on(published, command):
    code, out, _ = command("summary", f"hf://{NAME}")
    assert code == 0
    assert "paper_resnet18" in out
    code, _, err = command("summary", "hf://me/wolf")
    assert code == 2
    assert "hf://me/wolf: there is no such repository" in err


def test_the_card_of_a_run(hub, logged_in, tmp_path, shared_steps):  # noqa: F811
    """With the scores and the picture of the checkpoint that is published."""
    config = tiny.get_config()
    config.train.steps = config.train.eval_every = config.train.save_every = 2
    train.train(config, tmp_path / "run")
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    miou = next(line["eval/miou"] for line in metrics if "eval/miou" in line)
    picture = next((tmp_path / "run/pictures").iterdir()).read_bytes()
    hugging_face.push(saved_model.read(tmp_path / "run"), NAME)
    repo = hub.repos[NAME]
    card = repo.files["README.md"].decode()
    assert f"| mean IoU | {miou:.4f} on 5 images of shapes, split val, protocol paper |" in card
    assert "| data | shapes, split train |" in card
    assert "| size in training | 33 x 33 |" in card
    assert "(predictions.png)" in card
    assert repo.files["predictions.png"] == picture
    arrays = safetensors.numpy.load(repo.files["model.safetensors"])
    stats = (".mean", ".var")
    num_parameters = sum(each.size for name, each in arrays.items() if not name.endswith(stats))
    assert f"{num_parameters / 1e6:.1f} M parameters" in card
    assert str(tmp_path) not in card + repo.files["config.json"].decode()


def test_pushing_again_replaces_what_was_pushed(hub, logged_in, model):  # noqa: F811
    saved = saved_model.read(model)
    hugging_face.push(saved, NAME)
    first = dict(hub.repos[NAME].files)
    hub.repos[NAME].files |= {"predictions.png": b"of an older model", "notes.txt": b"mine"}
    hugging_face.push(saved, f"hf://{NAME}")
    assert hub.repos[NAME].files == first | {"notes.txt": b"mine"}


def test_files_of_others_are_not_replaced(hub, logged_in, model):  # noqa: F811
    saved = saved_model.read(model)
    for files in (
        {"model.safetensors": b"1", "config.json": b'{"model_type": "bert"}'},
        {"README.md": b"1"},
    ):
        repo = hub.repos[NAME] = Repo(files | {".gitattributes": b""})
        before = dict(repo.files)
        message = f"has files that this command did not write: {', '.join(sorted(files))}. Choose"
        with pytest.raises(UserError, match=message):
            hugging_face.push(saved, NAME)
        assert repo.files == before


def test_a_public_repository_does_not_become_private(hub, logged_in, model):  # noqa: F811
    saved = saved_model.read(model)
    hugging_face.push(saved, NAME)
    first = dict(hub.repos[NAME].files)
    with pytest.raises(UserError, match="is public; change that in its settings"):
        hugging_face.push(saved, NAME, private=True)
    assert hub.repos[NAME].files == first


@pytest.mark.parametrize("token", ["", "hf_expired"])
def test_pushing_without_a_token(hub, monkeypatch, model, token, command):  # noqa: F811
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    code, _, err = command("push", model, NAME)
    assert code == 2
    assert "the token is missing, expired, or does not permit this: log in with `hf auth" in err
    assert not hub.repos


@pytest.mark.parametrize("name", ["fox", "hf://me/fox@v1", "me/fox/small", ""])
def test_where_a_model_cannot_be_pushed(hub, logged_in, model, name):  # noqa: F811
    with pytest.raises(UserError, match="hf://org/name"):
        hugging_face.push(saved_model.read(model), name)
    assert not hub.requests
