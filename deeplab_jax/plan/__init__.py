"""Compiles a config's train step for TPU topologies without a TPU; see `deeplab-jax plan`."""
