"""The recipes of the speedrun: the shortest time to a stated mIoU on one GPU; see docs/speedrun.md.

    python configs/speedrun.py                # lists the rows
    python train.py --config configs/speedrun.py:camvid --workdir fast --config.data.root=camvid
    python -m benchmarks.speedrun camvid --root camvid --keep kept    # three seeds, with the clock

Rules: the training split alone, whole validation images at their own size, one scale. The track
"random" starts from random parameters, "weights" from a backbone of ImageNet.
"""

import dataclasses
from typing import Any

from deeplab_jax.config import (
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from deeplab_jax.config.io import get_row, with_fields


@dataclasses.dataclass(frozen=True)
class Row:
    """A recipe: what it is in words, and the fields that it sets."""

    text: str
    fields: dict[str, Any]


# A backbone that is trained already needs a smaller learning rate than its head.
_TRAINED = {"optimizer.learning_rate": 0.0005, "optimizer.head_multiplier": 4.0}
_VOC = {
    "data.name": "voc",
    "data.split": "trainaug",
    "data.crop_size": (321,),
    "data.ignore_label": 255,
    "train.steps": 6000,
    "optimizer.warmup_steps": 200,
}

ROWS: dict[str, Row] = {
    "camvid": Row("CamVid from random parameters", {}),
    "camvid_weights": Row("CamVid from a trained backbone", {**_TRAINED, "train.steps": 400}),
    "voc": Row("VOC from random parameters", _VOC),
    "voc_weights": Row("VOC from a trained backbone", {**_VOC, **_TRAINED, "train.steps": 3000}),
}


def get_config(row: str = "") -> Config:
    """Returns the config of a row.

    Raises:
      UserError: there is no such row; the message names the nearest.
    """
    base = Config(
        # Few kinds of convolutions, because a GPU takes longer to compile them than to train.
        model=ModelConfig(
            architecture="paper_resnet18", output_stride=8, bn_momentum=0.9, dtype="bfloat16"
        ),
        data=DataConfig(
            name="folder", split="train", crop_size=(361, 481), ignore_label=11, num_workers=8
        ),
        optimizer=OptimizerConfig(
            name="adamw",
            schedule="cosine",
            learning_rate=0.002,
            weight_decay=0.01,
            warmup_steps=50,
            clip_norm=1.0,
        ),
        train=TrainConfig(
            steps=800, batch_size=16, log_every=50, eval_every=0, save_every=0, loggers=()
        ),
        eval=EvalConfig(protocol="native", num_pictures=0),
    )
    return with_fields(base, get_row(ROWS, row, "configs/speedrun.py").fields)


if __name__ == "__main__":
    print("\n".join(f"{name:<16}{row.text}" for name, row in ROWS.items()))
