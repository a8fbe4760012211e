"""DeepLabv3 in JAX and Flax."""
