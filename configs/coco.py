"""COCO reduced to VOC's classes, to pretrain on for VOC (arXiv 1706.05587, section 4.3).

The paper tells neither how long it pretrained nor what came of it on COCO: all but the data is
as on VOC. Not run with this code.

    python train.py --config configs/coco.py --workdir runs/coco --config.data.root=coco
    python train.py --config configs/paper/table6_coco.py --workdir runs/table6_coco

`coco` holds annotations and images as published, see docs/datasets.md.
"""

from deeplab_jax.config import Config, DataConfig, InitConfig, ModelConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig("paper_resnet101"),
        data=DataConfig(name="coco", split="train", num_workers=8),
        init=InitConfig(backbone="resnet101"),
    )
