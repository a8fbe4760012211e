"""Speed of this package against torchvision, side by side; see `deeplab-jax bench`."""
