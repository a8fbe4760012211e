"""The study's recipe, which its other configs vary: a narrow ResNet-50 on shapes of all scales.

python train.py --config configs/study/base.py --workdir runs/study/base
"""

from deeplab_jax.config import (
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    ShapesConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            architecture="paper_resnet50",
            width=0.125,
            output_stride=16,
            multi_grid=(1, 1, 1),
            atrous_rates=(2, 4, 6),
            bn_momentum=0.9,
        ),
        data=DataConfig(
            name="shapes",
            split="train",
            crop_size=(128,),
            scale_range=(1.0, 1.0),
            num_workers=0,
            shapes=ShapesConfig(size=128, radius_range=(0.06, 0.45), max_shapes=6),
        ),
        optimizer=OptimizerConfig(learning_rate=0.3, warmup_steps=50, clip_norm=1.0),
        train=TrainConfig(steps=800, log_every=50, eval_every=400, save_every=200),
        eval=EvalConfig(batch_size=20, size=128),
    )
