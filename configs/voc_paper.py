"""The paper's recipe for the PASCAL VOC 2012 test set: both stages in one command.

Stage 1 trains 30 000 steps on trainaug at output stride 16. Stage 2 trains 30 000 steps on trainval
at output stride 8 with frozen batch norm (arXiv 1706.05587, section 4.1). The folder `stage1` of
the workdir is the workdir of stage 1. trainval includes val, so the scores of stage 2 on val say
nothing about generalization. Not run at full length with this code.

    python train.py --config configs/voc_paper.py --workdir runs/voc_paper

The same from COCO and with hard images shown twice, as in section 4.4:

    python train.py --config configs/voc_paper.py --workdir runs/voc_test \\
        --config.data.duplicate_classes=bicycle,chair,diningtable,pottedplant,sofa \\
        --config.init.path=runs/coco
"""

from deeplab_jax.config import Config, InitConfig, ModelConfig, SecondStageConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(architecture="paper_resnet101"),
        init=InitConfig(backbone="resnet101"),
        second_stage=SecondStageConfig(steps=30_000, output_stride=8, split="trainval"),
    )
