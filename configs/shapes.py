"""A narrow DeepLabv3 on generated shapes, for a first look: a few minutes on two CPU cores.

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
        # A quarter of ResNet-50's channels. The rates are small, because the feature map of a
        # 64-pixel image at output stride 8 has a side of 8. The decay of batch norm's statistics
        # is fast, because the training is short.
        model=ModelConfig(
            architecture="paper_resnet50",
            width=0.25,
            output_stride=8,
            multi_grid=(1, 1, 1),
            atrous_rates=(2, 4, 6),
            bn_momentum=0.9,
        ),
        # Drawing an image takes a millisecond, so threads are fast enough, and they start at once.
        data=DataConfig(
            name="shapes", split="train", crop_size=(64,), scale_range=(1.0, 1.0), num_workers=0
        ),
        optimizer=OptimizerConfig(learning_rate=0.3, warmup_steps=50, clip_norm=1.0),
        train=TrainConfig(steps=800, log_every=40, eval_every=400, save_every=200),
        eval=EvalConfig(batch_size=20, size=64),
    )
