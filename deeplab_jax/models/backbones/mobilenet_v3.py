"""MobileNetV3-Large (Howard et al. 2019, arXiv 1905.02244), with atrous convolution.

It equals torchvision's, block by block. Output stride 32 is the published network, 16 that of
torchvision's DeepLabv3, with the same parameters. The dilation rule is "paper", see
`backbones.mobilenet`. (torchvision's ResNets follow the other rule.)
"""

from __future__ import annotations

from jax.nn import hard_swish, relu

from deeplab_jax.models.backbones.mobilenet import MobileNet, Row

# arXiv 1905.02244, table 1.
TABLE: tuple[Row, ...] = (
    Row(3, 16, 16, False, relu, 1),
    Row(3, 64, 24, False, relu, 2),
    Row(3, 72, 24, False, relu, 1),
    Row(5, 72, 40, True, relu, 2),
    Row(5, 120, 40, True, relu, 1),
    Row(5, 120, 40, True, relu, 1),
    Row(3, 240, 80, False, hard_swish, 2),
    Row(3, 200, 80, False, hard_swish, 1),
    Row(3, 184, 80, False, hard_swish, 1),
    Row(3, 184, 80, False, hard_swish, 1),
    Row(3, 480, 112, True, hard_swish, 1),
    Row(3, 672, 112, True, hard_swish, 1),
    Row(5, 672, 160, True, hard_swish, 2),
    Row(5, 960, 160, True, hard_swish, 1),
    Row(5, 960, 160, True, hard_swish, 1),
)


class MobileNetV3(MobileNet):
    """MobileNetV3-Large without its classifier: "stem", "block1", ..., "block15" and "last"."""

    options = frozenset({"width"})
    rows = TABLE
    stem_features = 16
    activation = hard_swish
    last_expansion = 6
    out_feature = "last"
    aux_feature = "block4"  # the first features of output stride 8
