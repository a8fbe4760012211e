"""The models that others publish, with random weights, as the references of `certificates.py`.

Every original but one is the live package: torchvision, mmsegmentation (built from its own config
files), segmentation_models_pytorch, timm, transformers. VainF's DeepLabV3Plus-Pytorch is on no
package registry: `_VainF` is typed from its `network/_deeplab.py`, `network/modeling.py` and
`network/utils.py` (commit 48f990b), with torchvision's ResNet and ASPP, of which it has copies.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from speed.theirs import import_torchvision

Logits = Callable[[Any], dict[str, Any]]


class Original(NamedTuple):
    """A model of another package, in eval mode.

    Attributes:
      module: the torch module whose state dict is converted.
      stages: modules whose outputs are compared, by this package's names of its parts.
      logits: function from images `[n, c, h, w]` to logits of the images' size: "out" and, with an
        auxiliary head, "aux". Nothing for a backbone, whose `stages` are compared.
      save: writes a file or folder as the package does; returns its path.
    """

    module: Any
    stages: Mapping[str, Any]
    logits: Logits
    save: Callable[[Any, pathlib.Path], pathlib.Path]


class Case(NamedTuple):
    """An original to compare.

    Attributes:
      family: name of the family of weights.
      name: of the model in its package, and what is not its default.
      build: function that makes the original; takes the family's narrow options.
      settings: what its weights cannot tell, as fields of `Architecture`.
      multiple: the original accepts images whose sides are multiples of this number only, pixels.
      in_channels: number of channels of the images.
    """

    family: str
    name: str
    build: Callable[..., Original]
    settings: Mapping[str, Any] = {}
    multiple: int = 1
    in_channels: int = 3

    def __str__(self) -> str:
        return f"{self.family}: {self.name}"


# Names of modules on the registry (PyPI), which certificates state with their versions.
PACKAGES = {
    "torchvision": "torchvision",
    "mmseg": "onedl-mmsegmentation",
    "smp": "segmentation-models-pytorch",
    "timm": "timm",
    "vainf": "torchvision",
    "hf": "transformers",
}
MODULES = PACKAGES | {"mmseg": "mmseg", "smp": "segmentation_models_pytorch"}
TITLES = {
    "torchvision": "torchvision",
    "mmseg": "mmsegmentation",
    "smp": "segmentation_models.pytorch",
    "timm": "timm (backbones)",
    "vainf": "VainF DeepLabV3Plus-Pytorch (typed from its source)",
    "hf": "transformers (Hugging Face)",
}


def imported(family: str) -> Any:
    """Returns the original's package.

    Raises:
      ImportError: it is not installed, or lacks a package of its own.
    """
    # The others import torchvision, which may need help.
    vision = import_torchvision()
    return vision if MODULES[family] == "torchvision" else importlib.import_module(MODULES[family])


def randomize(module: Any, seed: int = 0) -> Any:
    """Draws all weights and statistics, so that a mistake cannot hide behind zeros and ones.

    Kernels are scaled by their number of inputs, and the last norm of a residual branch is small,
    so that activations keep their size over a hundred layers.
    """
    generator = torch.Generator().manual_seed(seed)
    normal = functools.partial(nn.init.normal_, generator=generator)
    uniform = functools.partial(nn.init.uniform_, generator=generator)
    for name, part in module.named_modules():
        if isinstance(part, nn.BatchNorm2d):
            last = name.endswith(("bn3", "reduce_1x1.normalization"))
            uniform(part.weight, *((0.2, 0.6) if last else (0.7, 1.8)))
            normal(part.bias, 0.0, 0.3)
            normal(part.running_mean, 0.0, 0.3)
            uniform(part.running_var, 0.5, 2.0)
        elif isinstance(part, nn.Conv2d):
            normal(part.weight, 0.0, math.sqrt(1 / part.weight[0].numel()))
            if part.bias is not None:
                normal(part.bias, 0.0, 0.3)
    return module.eval()


def _save(wrap: Callable[[Any], Any], module: Any, folder: pathlib.Path) -> pathlib.Path:
    torch.save(wrap(module.state_dict()), folder / "original.pth")
    return folder / "original.pth"


def _save_safetensors(module: Any, folder: pathlib.Path) -> pathlib.Path:
    from safetensors.torch import save_file

    save_file(module.state_dict(), folder / "original.safetensors")
    return folder / "original.safetensors"


def _save_pretrained(module: Any, folder: pathlib.Path) -> pathlib.Path:
    module.save_pretrained(folder / "original")
    return folder / "original"


_save_pth = functools.partial(_save, lambda state: state)
# What training scripts save: torchvision's reference, with and without averaging, VainF's main.py.
_save_model = functools.partial(_save, lambda state: {"model": state, "epoch": 29})
_save_model_ema = functools.partial(
    _save,
    lambda state: {
        "model_ema": {"n_averaged": torch.tensor(9)}
        | {f"module.{name}": tensor for name, tensor in state.items()},
        "epoch": 29,
    },
)
_save_model_state = functools.partial(_save, lambda state: {"cur_itrs": 1, "model_state": state})


def _resnet_stages(backbone: Any) -> dict[str, Any]:
    layers = {f"layer{number}": getattr(backbone, f"layer{number}") for number in (1, 2, 3, 4)}
    return {"stem": backbone.maxpool} | layers


def _torchvision(name: str, save: Any = _save_pth, **narrow: Any) -> Original:
    """A model of `torchvision.models.segmentation` with its auxiliary head."""
    build = getattr(imported("torchvision").models.segmentation, name)
    module = build(weights=None, weights_backbone=None, aux_loss=True, **narrow)
    return Original(randomize(module), _torchvision_stages(module), module, save)


def _torchvision_stages(module: Any) -> dict[str, Any]:
    backbone = module.backbone
    if "maxpool" in backbone:
        stages = _resnet_stages(backbone)
    else:
        stem, *blocks, last = backbone.values()
        numbered = {f"block{number}": block for number, block in enumerate(blocks, start=1)}
        stages = {"stem": stem, **numbered, "last": last}
    head = module.classifier
    heads = {"classifier": head, "aux_classifier": module.aux_classifier}
    return stages | {"aspp": head[0], "head_conv": head[3]} | heads


def _mmseg(
    config: str, *, with_config: bool = True, backbone: Mapping[str, Any] = {}, **narrow: Any
) -> Original:
    """A model of one of mmsegmentation's config files, as its inference of whole images.

    Args:
      config: name of the file, in its folder "deeplabv3".
      with_config: whether the checkpoint has the config, as those of mmengine's runner have.
      backbone: fields of the config's backbone to replace.
      **narrow: fields of the heads to replace, by head.
    """
    mmseg = imported("mmseg")
    from mmengine.config import Config
    from mmseg.registry import MODELS
    from mmseg.utils import register_all_modules

    register_all_modules()
    folder = pathlib.Path(mmseg.__file__).parent / ".mim" / "configs" / "deeplabv3"
    settings = Config.fromfile(folder / f"{config}.py")
    settings.model.pretrained = None
    settings.model.backbone.update(backbone)
    for part in ("backbone", "decode_head", "auxiliary_head"):
        settings.model[part].norm_cfg.type = "BN"  # SyncBN runs on a GPU alone
        settings.model[part].update(narrow.get(part, {}))
    meta = {"cfg": settings.pretty_text, "iter": 80_000} if with_config else {"iter": 80_000}
    module = randomize(MODELS.build(settings.model))
    head, aux = module.decode_head, module.auxiliary_head

    def logits(images: Any) -> dict[str, Any]:
        metas = [{"img_shape": tuple(images.shape[2:])}] * len(images)
        features = module.extract_feat(images)
        predict = {"out": head.predict, "aux": aux.predict}
        return {name: run(features, metas, module.test_cfg) for name, run in predict.items()}

    stages = _resnet_stages(module.backbone) | {"aspp": head.bottleneck}
    # A head's `predict` calls its `forward` without hooks; `conv_seg` ends it.
    stages |= {"classifier": head.conv_seg, "aux_classifier": aux.conv_seg}
    wrap = functools.partial(_save, lambda state: {"meta": meta, "state_dict": state})
    return Original(module, stages, logits, wrap)


def _smp(name: str, save: Any = _save_pretrained, **options: Any) -> Original:
    """A model of segmentation_models_pytorch without pretrained weights."""
    # Its default is one class with a sigmoid, which becomes two here.
    options = {"classes": 2, "encoder_weights": None} | options
    module = getattr(imported("smp"), name)(**options)
    randomize(module)
    decoder = module.decoder
    stages = _resnet_stages(module.encoder)
    if name == "DeepLabV3":
        stages |= {"aspp": decoder.aspp, "head_conv": decoder.relu}
    else:
        stages |= {"aspp": decoder.aspp[0], "head_conv": decoder.aspp, "decoder": decoder}
    stages["classifier"] = module.segmentation_head[0]
    return Original(module, stages, lambda images: {"out": module(images)}, save)


def _timm(name: str, output_stride: int) -> Original:
    """The features of a ResNet of timm."""
    module = imported("timm").create_model(name, features_only=True, output_stride=output_stride)
    randomize(module)

    def logits(images: Any) -> dict[str, Any]:
        module(images)
        return {}

    return Original(module, _resnet_stages(module), logits, _save_safetensors)


class _VainFBackbone(nn.ModuleDict):
    """ResNet without its classifier, which returns the features that the heads read."""

    def forward(self, images: Any) -> dict[str, Any]:
        features, x = {}, images
        for name, layer in self.items():
            x = layer(x)
            features[name] = x
        return {"low_level": features["layer1"], "out": features["layer4"]}


class _VainFHead(nn.Module):
    """`DeepLabHead`: torchvision's head under the name `classifier`."""

    def __init__(self, aspp: Any, num_classes: int) -> None:
        super().__init__()
        self.classifier = nn.Sequential(
            aspp,
            nn.Conv2d(256, 256, 3, padding=1, bias=False),
            nn.BatchNorm2d(256),
            nn.ReLU(),
            nn.Conv2d(256, num_classes, 1),
        )

    def forward(self, features: dict[str, Any]) -> Any:
        return self.classifier(features["out"])


class _VainFHeadPlus(nn.Module):
    """`DeepLabHeadV3Plus`: 48 low-level channels first, one 3x3 convolution."""

    def __init__(self, aspp: Any, num_classes: int) -> None:
        super().__init__()
        self.project = nn.Sequential(
            nn.Conv2d(256, 48, 1, bias=False), nn.BatchNorm2d(48), nn.ReLU()
        )
        self.aspp = aspp
        self.classifier = nn.Sequential(
            nn.Conv2d(304, 256, 3, padding=1, bias=False),
            nn.BatchNorm2d(256),
            nn.ReLU(),
            nn.Conv2d(256, num_classes, 1),
        )

    def forward(self, features: dict[str, Any]) -> Any:
        low_level = self.project(features["low_level"])
        out = self.aspp(features["out"])
        out = F.interpolate(out, low_level.shape[2:], mode="bilinear", align_corners=False)
        return self.classifier(torch.cat([low_level, out], dim=1))


class _VainF(nn.Module):
    """A model of DeepLabV3Plus-Pytorch: a ResNet and one of the heads above."""

    def __init__(self, backbone: str, plus: bool, output_stride: int, num_classes: int) -> None:
        super().__init__()
        models = imported("vainf").models
        dilate = [False, output_stride == 8, True]
        resnet = getattr(models, backbone)(weights=None, replace_stride_with_dilation=dilate)
        layers = {name: layer for name, layer in resnet.named_children() if name != "fc"}
        layers.pop("avgpool")
        rates = [12, 24, 36] if output_stride == 8 else [6, 12, 18]
        aspp = models.segmentation.deeplabv3.ASPP(2048, rates)
        self.backbone = _VainFBackbone(layers)
        self.classifier = (_VainFHeadPlus if plus else _VainFHead)(aspp, num_classes)

    def forward(self, images: Any) -> Any:
        logits = self.classifier(self.backbone(images))
        return F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=False)


def _vainf(name: str, output_stride: int) -> Original:
    """A model of VainF's `network.modeling`, such as "deeplabv3plus_resnet50"."""
    head_name, _, backbone = name.partition("_")
    plus = head_name == "deeplabv3plus"
    module = randomize(_VainF(backbone, plus, output_stride, num_classes=21))
    head = module.classifier
    stages = _resnet_stages(module.backbone)
    stages |= (
        {"aspp": head.aspp, "decoder": head.classifier[2]}
        if plus
        else {"aspp": head.classifier[0], "head_conv": head.classifier[3]}
    )
    stages["classifier"] = head
    return Original(module, stages, lambda images: {"out": module(images)}, _save_model_state)


def _hf(**options: Any) -> Original:
    """transformers' MobileNetV2 DeepLabv3; its logits are resized as TensorFlow's original does."""
    transformers = imported("hf")
    transformers.utils.logging.disable_progress_bar()
    config = transformers.MobileNetV2Config(**options)
    module = randomize(transformers.MobileNetV2ForSemanticSegmentation(config))
    body, head = module.mobilenet_v2, module.segmentation_head

    def logits(images: Any) -> dict[str, Any]:
        found = module(pixel_values=images).logits
        size = images.shape[2:]
        return {"out": F.interpolate(found, size, mode="bilinear", align_corners=True)}

    blocks = {f"block{number}": block for number, block in enumerate(body.layer, start=2)}
    stages = {"stem": body.conv_stem.first_conv, "block1": body.conv_stem} | blocks
    stages |= {"aspp": head.conv_projection, "classifier": head}
    return Original(module, stages, logits, _save_pretrained)


def _cases() -> list[Case]:
    cases = [
        Case("torchvision", name, functools.partial(_torchvision, name))
        for name in (
            "deeplabv3_resnet50", "deeplabv3_resnet101", "deeplabv3_mobilenet_v3_large",
        )
    ]  # fmt: skip
    cases += [
        Case(
            "torchvision",
            f"deeplabv3_resnet50, saved as {key}",
            functools.partial(_torchvision, "deeplabv3_resnet50", save),
        )
        for key, save in (("model", _save_model), ("model_ema", _save_model_ema))
    ]
    cases += [
        Case("mmseg", name, functools.partial(_mmseg, f"deeplabv3_{config}", **options), settings)
        for name, config, options, settings in _MMSEG
    ]
    cases += [_smp_case(*row) for row in _SMP]
    cases += [
        Case(
            "timm",
            f"{name}, output stride {stride}",
            functools.partial(_timm, name, stride),
            {"output_stride": stride},
        )
        for name, stride in itertools.product(_TIMM, (32, 16, 8))
    ]
    cases += [
        Case(
            "vainf",
            f"{name}, output stride {stride}",
            functools.partial(_vainf, name, stride),
            {"output_stride": stride, "atrous_rates": rates},
        )
        for name in ("deeplabv3_resnet50", "deeplabv3plus_resnet50", "deeplabv3plus_resnet101")
        for stride, rates in ((16, (6, 12, 18)), (8, (12, 24, 36)))
    ]
    for stride, multiplier, finegrained in (
        (8, 1.0, True), (16, 1.0, True), (32, 1.0, True), (16, 0.5, True), (8, 0.5, False),
    ):  # fmt: skip
        build = functools.partial(
            _hf,
            output_stride=stride,
            depth_multiplier=multiplier,
            finegrained_output=finegrained,
            num_labels=21,
        )
        name = f"MobileNetV2 {multiplier}, output stride {stride}"
        cases.append(Case("hf", name + ("" if finegrained else ", not finegrained"), build))
    return cases


_MG124 = {"output_stride": 16, "multi_grid": (1, 2, 4), "atrous_rates": (6, 12, 18)}
# Name, config file, arguments of `_mmseg`, settings that a file without its config needs.
_MMSEG: tuple[tuple[str, str, dict[str, Any], dict[str, Any]], ...] = (
    ("R-50 V1c d8", "r50-d8_4xb2-80k_cityscapes-512x1024", {}, {}),
    ("R-50 d8 (r50b)", "r50b-d8_4xb2-80k_cityscapes-512x1024", {}, {}),
    ("R-50 V1c d8, 769x769", "r50-d8_4xb2-80k_cityscapes-769x769", {}, {}),
    (
        "R-50 V1c d16 mg124, no config",
        "r101-d16-mg124_4xb2-80k_cityscapes-512x1024",
        {"backbone": {"depth": 50}, "with_config": False},
        _MG124,
    ),
    ("R-101 V1c d16 mg124", "r101-d16-mg124_4xb2-80k_cityscapes-512x1024", {}, {}),
    ("R-101 V1c d8", "r101-d8_4xb4-40k_voc12aug-512x512", {}, {}),
    ("R-18 V1c d8", "r18-d8_4xb2-80k_cityscapes-512x1024", {}, {}),
)
_TIMM = ("resnet18", "resnet50", "resnet50c", "resnet50d", "resnet50s", "resnet101d")
# Class, arguments, whether to save a state dict (".pth") instead of a folder with its config.
_SMP: tuple[tuple[str, dict[str, Any], bool], ...] = (
    ("DeepLabV3", {"encoder_name": "resnet18"}, False),
    ("DeepLabV3", {"encoder_name": "resnet18", "encoder_output_stride": 16}, False),
    ("DeepLabV3", {"encoder_name": "resnet34", "classes": 5}, True),
    ("DeepLabV3", {"encoder_name": "resnet50", "in_channels": 4, "classes": 21}, False),
    ("DeepLabV3", {"encoder_name": "resnet50", "encoder_output_stride": 16}, False),
    (
        "DeepLabV3",
        {
            "encoder_name": "resnet18",
            "in_channels": 1,
            "decoder_channels": 64,
            "decoder_atrous_rates": (3, 6, 9),
            "decoder_aspp_separable": True,
        },
        False,
    ),
    ("DeepLabV3Plus", {"encoder_name": "resnet18"}, False),
    ("DeepLabV3Plus", {"encoder_name": "resnet18", "encoder_output_stride": 8}, False),
    ("DeepLabV3Plus", {"encoder_name": "resnet50", "classes": 21}, True),
    (
        "DeepLabV3Plus",
        {"encoder_name": "resnet50", "encoder_output_stride": 8, "in_channels": 4},
        False,
    ),
    (
        "DeepLabV3Plus",
        {
            "encoder_name": "resnet18",
            "in_channels": 1,
            "decoder_channels": 64,
            "decoder_atrous_rates": (3, 6, 9),
            "decoder_aspp_separable": False,
        },
        False,
    ),
)


def _smp_case(kind: str, options: dict[str, Any], as_state_dict: bool) -> Case:
    default = 8 if kind == "DeepLabV3" else 16
    stride = options.get("encoder_output_stride", default)
    short = {"encoder_output_stride": "output stride", "decoder_channels": "channels"}
    short |= {"decoder_atrous_rates": "rates", "decoder_aspp_separable": "separable"}
    said = [
        f"{short.get(field, field)} {value}".replace("_", " ")
        for field, value in options.items()
        if field != "encoder_name"
    ]
    name = ", ".join([f"{kind} {options['encoder_name']}", *said])
    save = _save_pth if as_state_dict else _save_pretrained
    build = functools.partial(_smp, kind, save, **options)
    channels = options.get("in_channels", 3)
    return Case("smp", name, build, multiple=stride, in_channels=channels)


CASES: tuple[Case, ...] = tuple(_cases())
