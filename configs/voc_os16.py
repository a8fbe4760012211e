"""The paper's first stage on PASCAL VOC 2012: output stride 16, batch norm trained.

mIoU on val in the paper (ResNet-101, tables 5 and 6 of arXiv 1706.05587): 77.21 %; evaluated at
output stride 8: 78.51 %. It took 3.65 days on one K80. Not run at full length with this code.

    python train.py --config configs/voc_os16.py --workdir runs/voc_os16
"""

from deeplab_jax.config import Config, InitConfig, ModelConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(architecture="paper_resnet101"),
        init=InitConfig(backbone="resnet101"),
    )
