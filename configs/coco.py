"""COCO with VOC's classes, for pretraining before VOC (arXiv 1706.05587, section 4.3).

The paper states neither the length of the pretraining nor its result on COCO. All settings but the
data are those for VOC. Not run with this code.

    python train.py --config configs/coco.py --workdir runs/coco --config.data.root=coco
    python train.py --config configs/paper.py:table6_coco --workdir runs/table6_coco

The folder `coco` holds the annotations and images as published; see docs/datasets.md.
"""

from deeplab_jax.config import Config, DataConfig, InitConfig, ModelConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig("paper_resnet101"),
        data=DataConfig(name="coco", split="train", num_workers=8),
        init=InitConfig(backbone="resnet101"),
    )
