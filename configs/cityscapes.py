"""Cityscapes with fine labels, as in the paper's appendix B: output stride 16.

mIoU on val in the paper (ResNet-101, table 12 of arXiv 1706.05587): 77.23 %; evaluated at output
stride 8: 77.82 %; also with scales 0.75, 1, 1.25 and flip: 79.30 %. Not run with this code.

    python train.py --config configs/cityscapes.py --workdir runs/cityscapes \
        --config.data.root=cityscapes
    deeplab-jax evaluate runs/cityscapes --output-stride 8 --scales 0.75,1,1.25 --flip

The folder `cityscapes` holds leftImg8bit/ and gtFine/; see docs/datasets.md.
"""

from deeplab_jax.config import Config, DataConfig, EvalConfig, InitConfig, ModelConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(architecture="paper_resnet101"),
        data=DataConfig(name="cityscapes", split="train", crop_size=(769,), num_workers=8),
        init=InitConfig(backbone="resnet101"),
        # As on VOC: batches of 16, learning rate 0.007, power 0.9, scales 0.5 to 2.
        train=TrainConfig(steps=90_000, eval_every=5000),
        # Whole images, as in the paper; all have the same size.
        eval=EvalConfig(batch_size=2, protocol="native"),
    )
