"""`deeplab-jax push`."""

from __future__ import annotations

from typing import Annotated

import typer

from deeplab_jax.cli import options


def push(
    source: options.Checkpoint,
    repository: Annotated[str, typer.Argument(help="org/name on Hugging Face's hub.")],
    private: Annotated[
        bool, typer.Option("--private", help="Create the repository as a private one.")
    ] = False,
    license: Annotated[
        str, typer.Option(help="For the model card: apache-2.0, cc-by-4.0, ... Default: none.")
    ] = "",
) -> None:
    """Publish a model on Hugging Face's hub: weights, config and a model card.

    The card is made from the checkpoint: classes, and the scores and a picture of its evaluation.
    Needs `pip install 'deeplab-jax[hub]'` and a token that may write (`hf auth login`).

    Examples:
      deeplab-jax push runs/voc me/deeplabv3-voc --license=apache-2.0
      deeplab-jax predict hf://me/deeplabv3-voc photo.jpg --out predicted
    """
    from deeplab_jax.weights import hugging_face
    from deeplab_jax.weights.convert import read_model

    print(hugging_face.push(read_model(source), repository, private=private, license=license))
