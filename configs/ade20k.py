"""ADE20K with the 150 classes of the 2016 scene parsing challenge, on one GPU.

The paper has no results on ADE20K. The settings are those of its VOC runs, except for the fields
below. Not run with this code.

    python train.py --config configs/ade20k.py --workdir runs/ade20k --config.data.root=ade20k

The folder `ade20k` holds the unpacked ADEChallengeData2016.zip; see docs/datasets.md.
"""

from deeplab_jax.config import Config, DataConfig, EvalConfig, InitConfig, ModelConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(architecture="paper_resnet50"),
        data=DataConfig(name="ade20k", split="train", num_workers=8),
        init=InitConfig(backbone="resnet50"),
        # 63 epochs: ADE20K has twice as many images as trainaug, and seven times as many classes.
        train=TrainConfig(steps=80_000, eval_every=5000),
        # Image sides range from 200 to more than 2000 pixels.
        eval=EvalConfig(batch_size=2, protocol="native"),
    )
