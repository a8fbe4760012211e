"""docs/extending.md: its files run as written and behave as the page says."""

import importlib
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import deeplab_jax as dl
import tiny
from deeplab_jax import data as data_lib
from deeplab_jax.analysis import descriptions, summary
from deeplab_jax.config import IMAGE_LOSSES, LossConfig
from deeplab_jax.data import labels
from deeplab_jax.export import compare
from deeplab_jax.export.export import export
from deeplab_jax.models.architecture import BACKBONES, HEADS
from deeplab_jax.models.functional import FunctionalModel
from deeplab_jax.training import losses
from deeplab_jax.utils import registry
from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights import saved_model
from random_modules import random_variables

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "extending.md").read_text()
FILES = dict(re.findall(r"^`(\w+\.py)`:\n\n```python\n(.*?)^```$", PAGE, re.M | re.S))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder outside the package that holds the page's files and is on the Python path."""
    folder = tmp_path_factory.mktemp("own")
    for name, code in FILES.items():
        (folder / name).write_text(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder
    for name in ("convnext", "psp", "stripes", "tversky"):
        sys.modules.pop(name, None)
    for registered, name in (
        (BACKBONES, "convnext_tiny"),
        (HEADS, "psp"),
        (IMAGE_LOSSES, "tversky"),
        (data_lib.DATASETS, "stripes"),
    ):
        registered.pop(name, None)


@pytest.fixture
def convnext(folder, monkeypatch):
    """The backbone's module, with one block per stage."""
    module = importlib.import_module("convnext")
    monkeypatch.setattr(module, "DEPTHS", (1, 1, 1, 1))
    return module


# The module of each part, and the config fields that select it.
PARTS = {
    "convnext": {"model.architecture": "paper_convnext_tiny"},
    "psp": {"model.head": "psp"},
    "tversky": {"loss.name": "tversky"},
    "stripes": {"data.name": "stripes"},
}


@pytest.mark.usefixtures("shared_steps")
@pytest.mark.parametrize("name", PARTS)
def test_a_part_trains_resumes_and_is_summarised_and_exported(
    name, convnext, tmp_path, monkeypatch
):
    module = importlib.import_module(name)
    config = tiny.get_config()
    for field, value in PARTS[name].items():
        branch, _, leaf = field.partition(".")
        setattr(getattr(config, branch), leaf, value)
    config.train.steps, config.train.save_every, config.train.eval_every = 20, 10, 0
    config.optimizer.learning_rate = 0.01
    work = tmp_path / "run"

    result = dl.train(config, work)
    assert result.step == 20
    assert result.miou is not None
    expected = tiny.saved_state(work)

    # As if it had been killed after step 10: it ends with the same arrays, bit for bit.
    shutil.rmtree(work / "checkpoints" / "20")
    assert dl.train(config, work).step == 20
    for key, value in tiny.saved_state(work).items():
        np.testing.assert_array_equal(value, expected[key], err_msg=key)

    saved = saved_model.read(work)
    assert module.__name__ in {*saved.info["registered_by"].values(), "tversky", "stripes"}
    described = descriptions.read(str(work))
    found = summary.summarize(described.architecture, 65)
    assert found.params == sum(value.size for value in saved.variables.params.values())
    assert found.other_params == 0
    assert ("head psp" in summary.describe(described.architecture)) == (name == "psp")

    segmenter = dl.load(work)
    image = np.random.default_rng(0).integers(0, 256, (50, 61, 3), dtype=np.uint8)
    assert segmenter.predict(image).shape == (50, 61)

    if name in ("tversky", "stripes"):  # the model is of the package
        return
    monkeypatch.setattr(compare, "SYMBOLIC_SHAPES", ((1, 65, 48),))
    for suffix, size in ((".stablehlo", {}), (".onnx", {"height": 33, "width": 47, "batch": 1})):
        options = {"output": "logits", "platforms": ("cpu",), **size}
        done = export(work, tmp_path / f"out{suffix}", **options)
        assert all(one.difference <= done.limit for one in done.comparisons)


def test_a_symbolic_size_that_onnx_cannot_export_says_what_to_do(folder, tmp_path):
    importlib.import_module("psp")
    architecture = dl.architecture("paper_resnet18", num_classes=3, width=0.125, head="psp")
    write_model(tmp_path / "model", architecture)
    with pytest.raises(UserError, match="Give --height, --width and --batch"):
        export(tmp_path / "model", tmp_path / "out.onnx")


def write_model(path, architecture):
    model = FunctionalModel(architecture)
    variables = jax.device_get(random_variables(model))
    names = labels.named(*(f"class {i}" for i in range(architecture.num_classes)))
    info = saved_model.describe(
        architecture, names, mean=(0.5,) * 3, std=(0.25,) * 3, resize="none", size=(33, 33)
    )
    saved_model.write_model(path, variables, info)
    return model, variables


@pytest.mark.parametrize("name", ["convnext", "psp"])
def test_padding_does_not_change_predictions(name, convnext):
    importlib.import_module(name)
    chosen = {"convnext": ("paper_convnext_tiny", {}), "psp": ("paper_resnet18", {"head": "psp"})}
    base, overrides = chosen[name]
    model = FunctionalModel(dl.architecture(base, num_classes=3, width=0.125, **overrides))
    variables = random_variables(model)
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.normal(size=(1, 61, 50, 3)), jnp.float32)
    padded = jnp.asarray(rng.normal(size=(1, 129, 97, 3)), jnp.float32)
    padded = padded.at[:, :61, :50].set(image)
    apply = jax.jit(lambda *x, **options: model.apply(*x, **options)[0]["out"])
    alone = apply(variables, image)
    within = apply(variables, padded, sizes=jnp.asarray([[61, 50]]))[:, :61, :50]
    np.testing.assert_allclose(within, alone, atol=1e-5 * float(jnp.abs(alone).max()))


@pytest.mark.parametrize("output_stride", [8, 16])
def test_dense_features_of_convnext_contain_the_strided_ones(output_stride, convnext):
    at_32 = dl.architecture("paper_convnext_tiny", num_classes=2, width=0.125, output_stride=32)
    model = FunctionalModel(at_32)
    variables = random_variables(model)
    images = np.random.default_rng(0).normal(size=(1, 90, 75, 3)).astype(np.float32)
    strided, dense = (
        features_of(FunctionalModel(each), variables, images)
        for each in (at_32, at_32.at_output_stride(output_stride))
    )
    step = 32 // output_stride
    scale = float(jnp.abs(strided).max())
    np.testing.assert_allclose(dense[:, ::step, ::step], strided, atol=1e-5 * scale)


def features_of(model, variables, images):
    module = model._merge(variables)
    module.eval()
    return module.backbone(jnp.asarray(images))["stage4"]


def test_convnext_equals_timm(folder):
    # Imported before timm, whose import of torchvision would fail with the CPU build of torch.
    torch = importlib.import_module("torch_reference").torch
    timm = pytest.importorskip("timm", reason="install the `test` extra")
    module = importlib.import_module("convnext")
    torch.manual_seed(0)
    theirs = timm.create_model("convnext_tiny", pretrained=False).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("gamma"):
                parameter.uniform_(0.5, 1)
            elif parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    arrays = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    architecture = dl.architecture("paper_convnext_tiny", num_classes=2, output_stride=32)
    ours = module.ConvNeXtTiny(architecture, rngs=nnx.Rngs(0))
    copy_convnext(ours, arrays)
    images = np.random.default_rng(0).normal(size=(2, 64, 96, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()
    # timm's classifier on our features: mean over the image, LayerNorm, a matrix product.
    mean = np.asarray(ours(jnp.asarray(images))["stage4"], np.float64).mean((1, 2))
    centred = mean - mean.mean(-1, keepdims=True)
    normed = centred / np.sqrt(mean.var(-1, keepdims=True) + 1e-6)
    normed = normed * arrays["head.norm.weight"] + arrays["head.norm.bias"]
    logits = normed @ arrays["head.fc.weight"].T + arrays["head.fc.bias"]
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())


def copy_convnext(ours, arrays):
    def fill(layer, name, axes=None):
        weight = layer.scale if hasattr(layer, "scale") else layer.kernel
        weight[...] = jnp.asarray(np.transpose(arrays[f"{name}.weight"], axes))
        layer.bias[...] = jnp.asarray(arrays[f"{name}.bias"])

    fill(ours.stem, "stem.0", (2, 3, 1, 0))
    fill(ours.stem_norm, "stem.1")
    for i, blocks in enumerate(ours.stages):
        if i:
            fill(ours.downsamples[i - 1].norm, f"stages.{i}.downsample.0")
            fill(ours.downsamples[i - 1].conv, f"stages.{i}.downsample.1", (2, 3, 1, 0))
        for j, block in enumerate(blocks):
            name = f"stages.{i}.blocks.{j}"
            fill(block.depthwise, f"{name}.conv_dw", (2, 3, 1, 0))
            fill(block.norm, f"{name}.norm")
            fill(block.expand, f"{name}.mlp.fc1", (1, 0))
            fill(block.project, f"{name}.mlp.fc2", (1, 0))
            block.scale[...] = jnp.asarray(arrays[f"{name}.gamma"])


def test_tversky_is_its_formula(folder):
    module = importlib.import_module("tversky")
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 4, 5, 3)).astype(np.float32)
    targets = rng.integers(0, 2, (2, 4, 5)).astype(np.uint8)  # class 2 occurs nowhere
    targets[0, 0] = labels.IGNORE
    exponentials = np.exp(logits.astype(np.float64))
    p = exponentials / exponentials.sum(-1, keepdims=True)
    expected = 0.0
    for n in range(2):
        valid = targets[n] != labels.IGNORE
        scores = []
        for c in (0, 1):
            y = targets[n] == c
            right = (p[n, ..., c] * y)[valid].sum()
            wrong = (p[n, ..., c] * ~y)[valid].sum()
            missed = ((1 - p[n, ..., c]) * y)[valid].sum()
            scores.append(1 - right / (right + module.ALPHA * wrong + module.BETA * missed))
        expected += np.mean(scores)
    got = losses.loss_sum(jnp.asarray(logits), jnp.asarray(targets), LossConfig(name="tversky"))
    assert float(got) == pytest.approx(expected, rel=1e-5)


# --- Names that are not registered ---------------------------------------------------------------


def command(*arguments, cwd):
    code = "from deeplab_jax.cli.main import main\nmain()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, cwd=cwd
    )


def test_a_checkpoint_of_unregistered_parts_names_their_modules(convnext, folder, tmp_path):
    importlib.import_module("psp")
    architecture = dl.architecture("paper_convnext_tiny", num_classes=3, width=0.125, head="psp")
    write_model(tmp_path / "model", architecture)
    done = command("summary", tmp_path / "model", cwd=folder)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for words in ("backbone 'convnext_tiny'", "head 'psp'", "--import convnext --import psp"):
        assert words in done.stderr
    # Modules are found in the current folder; the option may be before or after the command.
    for arguments in (
        ("--import", "convnext", "summary", tmp_path / "model", "--import=psp"),
        ("summary", tmp_path / "model", "--import", "missing_module"),
    ):
        done = command(*arguments, cwd=folder)
        if "missing_module" in arguments:
            assert done.returncode == 2
            assert "there is no such module" in done.stderr
        else:
            # The file makes a deeper network than the fixture; `summary` does not read the arrays.
            assert done.returncode == 0, done.stderr
            assert "classifier.bottleneck" in done.stdout


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(UserError, match=r"unknown backbone 'resnet51'.*did you mean 'resnet5?0?1?"):
        _ = BACKBONES["resnet51"]
    with pytest.raises(UserError, match=r"head must be.*|unknown head 'asp'.*'aspp'"):
        dl.architecture("paper_resnet18", num_classes=2, head="asp")


def test_a_name_is_registered_once():
    known = registry.Registry("head", {"one": "math:sqrt"})
    assert known["one"](4) == 2
    assert known.register("two", len) is len
    assert known.register("two", len) is len
    with pytest.raises(ValueError, match="the head 'two' is registered already, by builtins"):
        known.register("two", max)
    with pytest.raises(ValueError, match="needs a name"):
        known.register("", len)


# --- Parts that do not match ---------------------------------------------------------------------


class Headless(nnx.Module):
    """A backbone with a single feature map."""

    out_feature, aux_feature, low_level_feature = "map", "", ""

    def __init__(self, channels=8, declared=8, stride=2):
        self.conv = nnx.Conv(3, channels, (3, 3), 2, padding=((1, 1), (1, 1)), rngs=nnx.Rngs(0))
        self._declared = (declared, stride)

    @property
    def features(self):
        from deeplab_jax.models.contracts import Feature

        return {"map": Feature(*self._declared)}

    def __call__(self, images):
        return {"map": self.conv(images)}


def test_a_model_can_be_built_from_modules():
    backbone = Headless()
    model = dl.DeepLabV3(backbone, dl.ASPPHead(backbone, num_classes=3, rngs=nnx.Rngs(1)))
    model.eval()
    assert model(jnp.zeros((1, 20, 31, 3)))["out"].shape == (1, 20, 31, 3)


def test_a_backbone_without_the_features_that_a_head_needs_is_refused():
    backbone = Headless()
    with pytest.raises(
        ValueError, match="reads the `aux_feature` '', which Headless does not have"
    ):
        dl.FCNHead(backbone, num_classes=3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="`low_level_feature`"):
        dl.ASPPHead(backbone, num_classes=3, plus=True, rngs=nnx.Rngs(0))
    other = dl.build_model("paper_resnet18", num_classes=3, width=0.125, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"'layer4', which Headless does not have.*It has map"):
        dl.DeepLabV3(backbone, other.classifier)


def test_a_head_of_other_channels_is_refused():
    head = dl.ASPPHead(Headless(8, 8), num_classes=3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="'map' with 8 channels, but Headless gives 16"):
        dl.DeepLabV3(Headless(16, 16), head)


@pytest.mark.parametrize("declared", [{"stride": 4}, {"declared": 9}])
def test_features_that_are_not_as_declared_are_refused(declared):
    backbone = Headless(**declared)
    head = dl.ASPPHead(backbone, num_classes=3, rngs=nnx.Rngs(0))
    model = dl.DeepLabV3(backbone, head)
    with pytest.raises(ValueError, match="Headless declares the feature 'map'"):
        model(jnp.zeros((1, 20, 31, 3)))


def test_dropout_with_its_own_random_state_is_refused(monkeypatch):
    class Forgetful(nnx.Module):
        def __init__(self, backbone, architecture, *, rngs):
            self.in_features = {backbone.out_feature: backbone.features["layer4"].channels}
            self.dropout = nnx.Dropout(0.1, rngs=rngs)
            self.logits = nnx.Conv(64, 2, (1, 1), rngs=rngs)

    monkeypatch.setitem(HEADS, "forgetful", Forgetful)
    architecture = dl.architecture("paper_resnet18", num_classes=2, width=0.125, head="forgetful")
    with pytest.raises(ValueError, match=r"neither nnx.Param nor nnx.BatchStat.*dropout"):
        FunctionalModel(architecture)
