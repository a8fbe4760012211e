"""Backbones, which are registered in `BACKBONES`; see `models.contracts.Backbone`."""

from deeplab_jax.models.architecture import BACKBONES
from deeplab_jax.models.backbones.mobilenet import MobileNetV2, MobileNetV3
from deeplab_jax.models.backbones.resnet import RESNETS, ResNet

BACKBONES.update(dict.fromkeys(RESNETS, ResNet))
BACKBONES.update({"mobilenet_v2": MobileNetV2, "mobilenet_v3_large": MobileNetV3})
