"""Fine-tuning torchvision's DeepLabv3, trained on COCO, on your own images and masks.

Leave the images and masks in my_data as they are. Check them, do what the check says, then train;
docs/own_data.md explains the layouts and encodings of masks:

    deeplab-jax data check my_data
    python train.py --config configs/folder.py --workdir runs/mine --config.data.root=my_data

Set `data.crop_size` to about the size of your images, and `train.batch_size` to what fits into
memory; if that is 4 or less, set `train.freeze_bn=True`. `init.path` can also be a converted
checkpoint or the workdir of a run.
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
        model=ModelConfig(architecture="torchvision_resnet50"),
        data=DataConfig(name="folder", split="train", crop_size=(513,)),
        # Downloaded at the first start, 160 MB. The last layers, which compute logits, are new.
        init=InitConfig(path="deeplabv3_resnet50"),
        # torchvision trained these weights at 0.02 with batches of 32: the same rate per image.
        # The warm-up limits the changes of the other layers while the new last layers are random.
        optimizer=OptimizerConfig(learning_rate=0.005, warmup_steps=100),
        train=TrainConfig(steps=5000, batch_size=8, eval_every=500, save_every=500),
    )
