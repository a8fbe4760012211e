"""Writes a small model with random weights as a checkpoint, for tests of prediction."""

import jax
import jax.numpy as jnp

from deeplab_jax.data import labels
from deeplab_jax.models.architecture import architecture
from deeplab_jax.models.functional import FunctionalModel
from deeplab_jax.weights import saved_model
from random_modules import random_variables

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
CLASSES = labels.LabelSet(
    ("background", "red fox", "bluebird"), ((0, 0, 0), (200, 0, 0), (0, 0, 200))
)


def write(path):
    """Writes it; its functions and arrays."""
    arch = architecture("paper_resnet18", num_classes=3, width=0.125)
    model = FunctionalModel(arch)
    variables = random_variables(model, seed=2)
    # With this seed, and logits near each other, each class wins somewhere.
    for name in ("classifier.logits.kernel", "classifier.logits.bias"):
        variables.params[name] = jnp.asarray(0.05 * variables.params[name])
    info = saved_model.describe(arch, CLASSES, mean=MEAN, std=STD, resize="none", size=(33, 33))
    saved_model.write_model(path, jax.device_get(variables), info)
    return model, variables
