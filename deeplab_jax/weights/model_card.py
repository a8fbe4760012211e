"""Model cards for Hugging Face's hub, made from a model and what its run recorded."""

from __future__ import annotations

import contextlib
import json
import math
import pathlib
import re
import shutil

from deeplab_jax.config import io as config_io
from deeplab_jax.config import resolve_eval
from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights.saved_model import SavedModel

PICTURE = "predictions.png"
_CARD = """\
---
library_name: deeplab-jax
pipeline_tag: image-segmentation
{license}tags:
- deeplabv3
- semantic-segmentation
- jax
---

# {name}

A DeepLabv3 for semantic segmentation, made with deeplab_jax.
{picture}
| | |
| --- | --- |
{rows}

```python
import deeplab_jax as dl

segmenter = dl.load("hf://{name}")
ids = segmenter.predict("photo.jpg")  # the class of each pixel
```
"""


def write(saved: SavedModel, folder: pathlib.Path, *, name: str, license: str = "") -> None:
    """Writes the card `README.md`, and the picture in it, into an existing folder.

    If the model is a checkpoint of a run, the card has the scores that the run recorded at that
    step, and the picture of its predictions.

    Args:
      saved: The model.
      folder: The folder.
      name: `org/name` of the repository.
      license: The identifier of a license, such as "apache-2.0"; empty: the card names none.

    Raises:
      UserError: The license is no identifier, or `saved.variables` cannot be read.
      OSError: The files cannot be written.
    """
    if not re.fullmatch(r"[\w.+-]*", license):
        raise UserError(f"--license must be an identifier such as apache-2.0, got {license!r}")
    picture = saved.path / "../../pictures" / f"predictions_{saved.path.name:0>6}.png"
    if has_picture := picture.is_file():
        shutil.copyfile(picture, folder / PICTURE)
    info, architecture = saved.info, saved.architecture
    num_parameters = sum(math.prod(array.shape) for array in saved.variables.params.values())
    rows = {
        "architecture": f"{architecture.name}, output stride {architecture.output_stride}, "
        f"{num_parameters / 1e6:.1f} M parameters",
        f"{architecture.num_classes} classes": ", ".join(info["classes"]),
        "normalization": f"mean {info['mean']}, std {info['std']} of each channel, 0..1",
        "size in training": "{} x {}".format(*info["input_size"]),
        **_scores(saved.path),
    }
    card = _CARD.format(
        name=name,
        license=f"license: {license}\n" if license else "",
        picture=f"\n![Image, labels, prediction]({PICTURE})\n" if has_picture else "",
        rows="\n".join(f"| {key} | {text.replace('|', '&#124;')} |" for key, text in rows.items()),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _scores(checkpoint: pathlib.Path) -> dict[str, str]:
    """Returns rows of the card on the run of a checkpoint; none if it belongs to no run."""
    config = config_io.from_run(checkpoint)
    if config is None:
        return {}
    rows = {"data": f"{config.data.name}, split {config.data.split}"}
    metrics = checkpoint / "../../metrics.jsonl"
    for line in metrics.read_text().splitlines() if metrics.is_file() else ():
        # Not of another line, or of one that a kill cut short.
        with contextlib.suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            if str(entry["step"]) == checkpoint.name:
                rows["mean IoU"] = (
                    f"{entry['eval/miou']:.4f} on {entry['eval/images']} images of "
                    f"{config.data.name}, split {config.data.eval_split}, protocol "
                    f"{resolve_eval(config).protocol}"
                )
    return rows
