"""A narrow DeepLabv3 on generated shapes, for a first look: minutes on two CPU cores.

python train.py --config configs/shapes.py --workdir runs/shapes
"""

from deeplab_jax.config import (
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        model=ModelConfig(architecture="paper_resnet50", width=0.25, bn_momentum=0.9),
        data=DataConfig(
            name="shapes", split="train", crop_size=(96,), scale_range=(0.8, 1.25), num_workers=0
        ),
        optimizer=OptimizerConfig(learning_rate=0.05),
        train=TrainConfig(steps=300, batch_size=16, log_every=20, eval_every=100, save_every=100),
        eval=EvalConfig(batch_size=20, size=96),
    )
