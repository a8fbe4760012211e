"""What a run leaves to read and to look at: metrics.jsonl, TensorBoard, pictures."""

from __future__ import annotations

import json
import pathlib

import numpy as np

from deeplab_jax.utils.files import write_bytes, write_png


class Writer:
    """Writes under a workdir; of several processes only the first writes anything."""

    def __init__(self, workdir: pathlib.Path, *, start_step: int, enabled: bool) -> None:
        """Opens the files, and drops what an earlier attempt wrote past `start_step`."""
        self._workdir = workdir
        self._enabled = enabled
        if not enabled:
            return
        # Here, as it imports PyTorch where there is one: seconds, which only the writer spends.
        from tensorboardX import SummaryWriter

        self._jsonl_path = workdir / "metrics.jsonl"
        _drop_after(self._jsonl_path, start_step)
        self._jsonl = self._jsonl_path.open("a", buffering=1)
        self._tensorboard = SummaryWriter(
            str(workdir / "tensorboard"), purge_step=start_step + 1 if start_step else None
        )

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl, and TensorBoard's scalars; NaN is written as null."""
        if not self._enabled:
            return
        clean = {name: value if np.isfinite(value) else None for name, value in values.items()}
        self._jsonl.write(json.dumps({"step": step} | clean) + "\n")
        for name, value in clean.items():
            if value is not None:
                self._tensorboard.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: np.ndarray) -> pathlib.Path | None:
        """Writes a uint8 RGB picture to `picture_path` and into TensorBoard."""
        if not self._enabled:
            return None
        path = self.picture_path(step, name)
        path.parent.mkdir(exist_ok=True)
        write_png(path, image)
        self._tensorboard.add_image(name, image, step, dataformats="HWC")
        return path

    def picture_path(self, step: int, name: str) -> pathlib.Path:
        return self._workdir / "pictures" / f"{name}_{step:06d}.png"

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._enabled:
            self._jsonl.close()
            self._tensorboard.close()


def _drop_after(path: pathlib.Path, step: int) -> None:
    """Keeps the lines up to a step; a line cut short by a kill goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if entry["step"] <= step:
            kept.append(line)
    write_bytes(path, "".join(f"{line}\n" for line in kept).encode())
