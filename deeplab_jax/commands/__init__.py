"""The commands of `deeplab-jax`, a module each; heavy imports stand inside the functions."""
