"""Runs the same training here and in torchvision, and compares the mIoU on val and the time.

The model is ResNet-50 DeepLabv3 at output stride 8, with the same random initial parameters in both
packages, trained in bfloat16 on crops of the whole image with SGD and the poly schedule. Both use
batches of this package's pipeline, so that only the model, its gradient and the optimizer differ.
Both are evaluated on whole images at their own size.

    python benchmarks/camvid.py --root camvid --json camvid.json
    python benchmarks/camvid.py --root camvid --alone --steps 600   # without torchvision

Needs CamVid in the layout of docs/own_data.md, a GPU, and without --alone PyTorch and torchvision.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np
from rich.console import Console

from deeplab_jax import data as data_lib
from deeplab_jax.cli.errors import exit_on_user_error
from deeplab_jax.config import (
    Config,
    DataConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from deeplab_jax.data import pipeline
from deeplab_jax.data.dataset import Dataset, read_example
from deeplab_jax.data.labels import IGNORE
from deeplab_jax.evaluation.confusion import confusion_matrix, scores
from deeplab_jax.models.functional import FunctionalModel
from deeplab_jax.training.train import resolve_architecture, train
from deeplab_jax.utils.files import write_bytes
from deeplab_jax.weights import families
from speed import measure
from speed.cases import AUX_WEIGHT
from speed.theirs import import_torchvision

WORKERS = 8  # processes that prepare batches


def make_config(
    root: str, steps: int, batch_size: int, dtype: str, crop: tuple[int, ...]
) -> Config:
    return Config(
        model=ModelConfig(architecture="torchvision_resnet50", dtype=dtype),
        data=DataConfig(
            name="folder",
            root=root,
            split="train",
            crop_size=crop,
            ignore_label=11,
            num_workers=WORKERS,
        ),
        optimizer=OptimizerConfig(learning_rate=0.02, warmup_steps=min(50, steps // 4)),
        loss=LossConfig(aux_weight=AUX_WEIGHT),
        train=TrainConfig(
            steps=steps, batch_size=batch_size, eval_every=0, save_every=0, log_every=50
        ),
        eval=EvalConfig(protocol="native"),
    )


def run_ours(config: Config) -> dict[str, Any]:
    """Trains with this package; the seconds per step are the median of its log."""
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        result = train(config, folder)
        seconds = time.perf_counter() - begun
        lines = pathlib.Path(folder, "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in lines]
    rates = [line["images_per_second"] for line in logged if "images_per_second" in line]
    losses = [line["loss"] for line in logged if "loss" in line]
    waits = [line["data_wait_share"] for line in logged if "data_wait_share" in line]
    return {
        "miou": result.miou,
        "seconds": seconds,
        "seconds_a_step": config.train.batch_size / statistics.median(rates[1:] or rates),
        "last_loss": losses[-1],
        "data_wait_share": statistics.median(waits[1:] or waits),
    }


def run_theirs(config: Config, dataset: Dataset, val: Dataset) -> dict[str, Any]:
    """Trains in PyTorch with channels_last and autocast, from the same initial parameters."""
    vision = import_torchvision()
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    model = vision.models.segmentation.deeplabv3_resnet50(
        weights=None, weights_backbone=None, aux_loss=True, num_classes=val.labels.num_classes
    )
    ours = FunctionalModel(resolve_architecture(config, dataset))
    arrays = families.from_model(ours.init(jax.random.key(config.seed)), ours.architecture)
    model.load_state_dict({name: torch.from_numpy(np.array(a)) for name, a in arrays.items()})
    model = model.to(device, memory_format=torch.channels_last).train()
    decayed, others = [], []
    for parameter in model.parameters():
        (decayed if parameter.ndim == 4 else others).append(parameter)  # kernels only
    settings = config.optimizer
    optimizer = torch.optim.SGD(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others}],
        lr=settings.learning_rate,
        momentum=settings.momentum,
        **({"fused": True} if device == "cuda" else {}),
    )
    mean, std = (
        torch.tensor(values, device=device).view(1, 3, 1, 1) * 255
        for values in (config.data.mean, config.data.std)
    )

    def to_device(image: np.ndarray) -> Any:
        tensor = torch.from_numpy(image).to(device, non_blocking=True).permute(0, 3, 1, 2)
        return (tensor.float() - mean) / std

    def autocast() -> Any:
        enabled = config.model.dtype == "bfloat16"
        return torch.autocast(device, torch.bfloat16, enabled=enabled)

    def rate(step: int) -> float:
        warm, steps = settings.warmup_steps, config.train.steps
        if step < warm:
            return settings.learning_rate * step / warm
        return settings.learning_rate * (1 - (step - warm) / (steps - warm)) ** settings.power

    begun = time.perf_counter()
    marks, loss = [], None
    batches = pipeline.train_batches(
        dataset,
        config.data,
        batch_size=config.train.batch_size,
        seed=config.seed,
        start_step=0,
    )
    with batches:
        for step in range(config.train.steps):
            batch = next(batches)
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            target = torch.from_numpy(batch["label"]).to(device).long()
            with autocast():
                outputs = model(to_device(batch["image"]))
                losses = {
                    name: torch.nn.functional.cross_entropy(
                        logits.float(), target, ignore_index=IGNORE
                    )
                    for name, logits in outputs.items()
                }
                loss = losses["out"] + AUX_WEIGHT * losses["aux"]
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if (step + 1) % config.train.log_every == 0:
                last_loss = float(losses["out"].detach())  # waits for the device
                marks.append(time.perf_counter())
    per_step = [(b - a) / config.train.log_every for a, b in itertools.pairwise(marks)]

    model.eval()
    classes = val.labels.num_classes
    matrix = np.zeros((classes, classes), np.int64)
    with torch.inference_mode(), autocast():
        for index in range(len(val.source)):
            example = read_example(val, index)
            logits = model(to_device(example["image"][None]))["out"]
            ids = logits.argmax(1)[0].cpu().numpy()
            matrix += confusion_matrix(example["label"], ids.astype(np.uint8), classes)
    return {
        "miou": scores(matrix).miou,
        "seconds": time.perf_counter() - begun,
        "seconds_a_step": statistics.median(per_step),
        "last_loss": last_loss,
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", required=True, help="folder of CamVid")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--crop", type=int, nargs=2, default=(361, 481), metavar=("H", "W"))
    parser.add_argument("--alone", action="store_true", help="do not run torchvision")
    parser.add_argument("--json", type=pathlib.Path, help="file of results")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    config = make_config(args.root, args.steps, args.batch_size, args.dtype, tuple(args.crop))
    console = Console(highlight=False, soft_wrap=True)
    train_set, val_set = (data_lib.load(config.data, split) for split in ("train", "val"))
    result = measure.conditions() | {
        "steps": args.steps,
        "batch_size": args.batch_size,
        "crop": list(args.crop),
        "dtype": args.dtype,
        "optimizer": dataclasses.asdict(config.optimizer),
    }
    sides = {
        "ours": lambda: run_ours(config),
        "theirs": lambda: run_theirs(config, train_set, val_set),
    }
    for side in ["ours"] if args.alone else sides:
        result[side] = sides[side]()
        console.print(side, result[side])
        if args.json:
            write_bytes(args.json, (json.dumps(result, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main())
