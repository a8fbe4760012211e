"""CamVid on one GPU: 367 + 101 street scenes of 480 x 360 pixels with 11 classes.

Not run at full length with this code. docs/own_data.md has a short run on two CPU cores. The recipe
is the paper's. From random parameters, two other recipes were run: in docs/study.md, AdamW, the
cosine schedule and ClassMix gained nothing certain in 400 steps of small crops; the recipe of
configs/speedrun.py, 800 steps with AdamW, reached a mIoU of 56 % in 57 s on an H200.

    python train.py --config configs/camvid.py --workdir runs/camvid --config.data.root=camvid

The folder `camvid` holds images/{train,val}, masks/{train,val} with ids 0 to 10 and 11 for void,
and classes.txt.
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
        # Poles and signs are a few pixels wide, so the output stride is 8. With the paper's decay
        # of 0.9997, a tenth of ImageNet's batch statistics would remain after 8000 steps.
        model=ModelConfig(architecture="paper_resnet50", output_stride=8, bn_momentum=0.99),
        # The size of an image plus one pixel: with sides of 8 k + 1 the first and last features
        # are centred on the first and last pixels. Two thirds of the crops are cut from enlarged
        # images, one third shows a whole shrunk image.
        data=DataConfig(
            name="folder", split="train", crop_size=(361, 481), ignore_label=11, num_workers=8
        ),
        init=InitConfig(backbone="resnet50"),
        # The head starts from random parameters, the backbone from ImageNet's.
        optimizer=OptimizerConfig(learning_rate=0.01, head_multiplier=5.0, warmup_steps=100),
        train=TrainConfig(steps=8000, batch_size=16, eval_every=500, save_every=500),
    )
