"""A small-scale study of the paper's choices on generated shapes; docs/study.md has the results.

    python configs/study.py                   # lists the rows
    python train.py --config configs/study.py:os8 --workdir runs/study/os8

The base is a narrow ResNet-50 on shapes of all sizes; each row changes some of its fields. The rows
"recipe..." compare recipes of today on few images; their base is "recipe".
"""

import dataclasses
from typing import Any

from deeplab_jax.config import (
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    ShapesConfig,
    TrainConfig,
)
from deeplab_jax.config.io import get_row, with_fields


@dataclasses.dataclass(frozen=True)
class Row:
    """A run: its difference from the base in words, and the fields it sets."""

    text: str
    fields: dict[str, Any]


def _half_and_half(steps: int) -> dict[str, Any]:
    """Returns the paper's two stages; stage 2 starts at a seventh of stage 1's learning rate."""
    return {
        "train.steps": steps,
        "second_stage.steps": steps,
        "second_stage.output_stride": 8,
        "second_stage.learning_rate": 0.043,
    }


# The base of the recipes: a smaller network, and few images, so that augmentation may matter.
_RECIPE: dict[str, Any] = {
    "model.architecture": "paper_resnet18",
    "model.width": 0.25,
    "data.shapes.size": 65,
    "data.shapes.num_train": 100,
    "data.shapes.max_shapes": 3,
    "data.shapes.radius_range": (0.12, 0.4),
    "data.crop_size": (65,),
    "data.scale_range": (0.75, 1.5),
    "eval.size": 65,
    "train.steps": 700,
    "train.eval_every": 0,
    "train.save_every": 0,
}
_COSINE = {"optimizer.schedule": "cosine"}
_ADAMW = {
    "optimizer.name": "adamw",
    "optimizer.learning_rate": 0.01,
    "optimizer.weight_decay": 0.05,
}
_MODERN = {**_ADAMW, **_COSINE, "data.augment.mix": "copy_paste"}
_LONG = {"train.steps": 1400}
# With momentum 0.9, a weight decay in the gradient acts tenfold.
_DECOUPLED = {"optimizer.decoupled_weight_decay": True, "optimizer.weight_decay": 1e-3}
# Recipes of today, each a change of their base.
_RECIPES: dict[str, Row] = {
    "recipe": Row("ResNet-18, 100 images of 65 pixels: SGD, poly, random scale and flip", {}),
    "recipe_cosine": Row("cosine schedule", _COSINE),
    "recipe_adamw": Row("AdamW with the cosine schedule", _ADAMW | _COSINE),
    "recipe_decoupled": Row("decoupled weight decay of 0.001", _DECOUPLED),
    "recipe_ema": Row("EMA of the parameters, decay 0.99", {"optimizer.ema_decay": 0.99}),
    "recipe_smoothing": Row("label smoothing of 0.1", {"loss.label_smoothing": 0.1}),
    "recipe_photometric": Row("photometric distortion", {"data.augment.photometric": 1.0}),
    "recipe_jitter": Row("colour jitter of strength 0.5", {"data.augment.color_jitter": 0.5}),
    "recipe_blur": Row("blur of every second crop", {"data.augment.blur": 0.5}),
    "recipe_rotation": Row("rotation by up to 45 degrees", {"data.augment.rotation": 45.0}),
    "recipe_class_share": Row(
        "at most 0.75 of a crop is one class", {"data.augment.max_class_share": 0.75}
    ),
    "recipe_cutmix": Row("CutMix, every second crop", {"data.augment.mix": "cutmix"}),
    "recipe_classmix": Row("ClassMix, every second crop", {"data.augment.mix": "classmix"}),
    "recipe_copy_paste": Row("copy-paste, every second crop", {"data.augment.mix": "copy_paste"}),
    "recipe_modern": Row("AdamW, cosine schedule and copy-paste", _MODERN),
    "recipe_long": Row("twice as many steps", _LONG),
    "recipe_long_copy_paste": Row(
        "the same with copy-paste", {**_LONG, "data.augment.mix": "copy_paste"}
    ),
    "recipe_long_modern": Row(
        "the same with AdamW, cosine schedule and copy-paste", _MODERN | _LONG
    ),
}

ROWS: dict[str, Row] = {
    "base": Row("output stride 16, no multi-grid, rates 2, 4, 6, image pooling", {}),
    # Strides and rates. ASPP's rates scale with the output stride, as in the paper.
    "os8": Row("output stride 8", {"model.output_stride": 8, "model.atrous_rates": (4, 8, 12)}),
    "os32": Row("output stride 32", {"model.output_stride": 32, "model.atrous_rates": (1, 2, 3)}),
    "grid121": Row("multi-grid (1, 2, 1)", {"model.multi_grid": (1, 2, 1)}),
    "grid124": Row("multi-grid (1, 2, 4)", {"model.multi_grid": (1, 2, 4)}),
    # ASPP.
    "block4": Row(
        "neither ASPP nor a cascade: block4's features go to the logits",
        {"model.cascade": 0, "model.atrous_rates": None},
    ),
    "no_pooling": Row("ASPP without image pooling", {"model.image_pooling": False}),
    "rates123": Row("ASPP with rates half as large", {"model.atrous_rates": (1, 2, 3)}),
    "rates2468": Row(
        "ASPP with a fourth rate, without image pooling",
        {"model.image_pooling": False, "model.atrous_rates": (2, 4, 6, 8)},
    ),
    # Training.
    "shrunk_labels": Row("labels downsampled to the logits in training", {"loss.upsample": False}),
    "frozen_bn": Row(
        "batch norm frozen from the start: mean 0, variance 1", {"train.freeze_bn": True}
    ),
    "bn_of_4": Row("batches of 16, batch norm statistics of 4 images", {"optimizer.accumulate": 4}),
    "bn_decay9997": Row("the paper's decay, meant for 30 000 steps", {"model.bn_momentum": 0.9997}),
    "batch4": Row("batches of 4, the same number of steps", {"train.batch_size": 4}),
    "two_stages": Row("half of the steps at output stride 8, frozen", _half_and_half(400)),
    # One pixel more than a multiple of the output stride, as the paper's 513.
    "size129": Row(
        "images of 129 pixels",
        {"data.shapes.size": 129, "data.crop_size": (129,), "eval.size": 129},
    ),
    **{name: Row(row.text, _RECIPE | row.fields) for name, row in _RECIPES.items()},
}


def get_config(row: str = "base") -> Config:
    """Returns the config of a row.

    Raises:
      UserError: there is no such row; the message names the nearest.
    """
    base = Config(
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
    return with_fields(base, get_row(ROWS, row, "configs/study.py").fields)


if __name__ == "__main__":
    print("\n".join(f"{name:<24}{row.text}" for name, row in ROWS.items()))
