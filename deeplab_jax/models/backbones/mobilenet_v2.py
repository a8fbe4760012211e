"""MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381), with atrous convolution.

With symmetric padding it equals torchvision's features at output stride 32. With padding "same" and
the dilation rule "torchvision" it equals TensorFlow's and Hugging Face's at each output stride.
The last 1x1 convolution, to 1280 channels, is left out, as in DeepLab's own code.
"""

from __future__ import annotations

from jax.nn import relu6

from deeplab_jax.models.backbones.mobilenet import MobileNet, Row

# Expansion, channels, number of blocks and stride of the first one: arXiv 1801.04381, table 2.
SEQUENCES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class MobileNetV2(MobileNet):
    """MobileNetV2 without its classifier: "stem", "block1", ..., "block17"."""

    options = frozenset({"width", "padding", "dilation_rule"})
    rows = tuple(
        Row(3, None, features, False, relu6, stride if index == 0 else 1, expansion)
        for expansion, features, num_blocks, stride in SEQUENCES
        for index in range(num_blocks)
    )
    stem_features = 32
    activation = relu6
    out_feature = "block17"
    aux_feature = "block6"  # the last features of output stride 8
