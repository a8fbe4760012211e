"""Cracks in concrete on two CPU cores, in a few minutes: docs/cracks.md goes through it.

    python docs/make_cracks.py cracks
    python train.py --config configs/cracks.py --workdir runs/cracks --config.data.root=cracks

For photos of your own, start from weights that know photos, as configs/folder.py does, and keep
`loss` from here.
"""

from deeplab_jax.config import (
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        # A quarter of ResNet-18's channels, from random parameters. A crack is three pixels wide:
        # the output stride is 8, and the decoder uses features of stride 4.
        model=ModelConfig(
            architecture="paper_resnet18",
            width=0.25,
            output_stride=8,
            multi_grid=(1, 1, 1),
            atrous_rates=(2, 4, 6),
            decoder="plus",
            bn_momentum=0.9,
        ),
        data=DataConfig(
            name="folder", split="train", crop_size=(129,), scale_range=(0.75, 1.5), num_workers=0
        ),
        # 1.6 % of the pixels are cracks: unweighted, all background is nearly right.
        loss=LossConfig(class_weights="auto"),
        optimizer=OptimizerConfig(learning_rate=0.1, warmup_steps=50, clip_norm=1.0),
        train=TrainConfig(steps=400, batch_size=8, log_every=40, eval_every=200, save_every=200),
    )
