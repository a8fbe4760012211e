"""DeepLabv3 as Flax modules. Imports no third-party packages but jax, flax, jaxtyping and NumPy."""

# Fill the registries, whichever module of the package is imported first.
from deeplab_jax.models import backbones as backbones
from deeplab_jax.models import heads as heads
