"""The paper's second stage on PASCAL VOC 2012, after voc_os16: output stride 8, batch norm frozen.

    python train.py --config configs/voc_os8.py --workdir runs/voc_os8 \
        --config.init.path=runs/voc_os16
"""

from deeplab_jax.config import (
    Config,
    DataConfig,
    InitConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        model=ModelConfig(architecture="paper_resnet101", output_stride=8),
        data=DataConfig(split="trainval"),
        init=InitConfig(path="runs/voc_os16"),
        optimizer=OptimizerConfig(learning_rate=0.001),
        train=TrainConfig(freeze_bn=True),
    )
