"""DeepLabv3 as Flax modules. Needs jax, flax and NumPy alone."""

# Fills the registries, whichever module of the package is imported first.
from deeplab_jax.models import backbones as backbones
from deeplab_jax.models import heads as heads
