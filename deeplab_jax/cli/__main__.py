"""Runs the command line as `python -m deeplab_jax.cli`."""

from deeplab_jax.cli.main import main

if __name__ == "__main__":
    main()
