"""Table 6: pretrained on COCO, and a smaller learning rate.

Paper, val mIoU: 82.70 %. Not run here. That is at output stride 8, with six scales and mirrored.

    python train.py --config configs/coco.py --workdir runs/coco --config.data.root=coco
    python train.py --config configs/paper/table6_coco.py --workdir runs/table6_coco
    deeplab-jax evaluate runs/table6_coco --output-stride 8 \\
        --scales 0.5,0.75,1,1.25,1.5,1.75 --flip
"""

from deeplab_jax.config import Config, InitConfig, ModelConfig, OptimizerConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig("paper_resnet101"),
        init=InitConfig(path="runs/coco"),
        optimizer=OptimizerConfig(learning_rate=0.0001),
    )
