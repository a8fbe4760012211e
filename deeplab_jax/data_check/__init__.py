"""`deeplab-jax data check`: what is wrong with a folder of images and masks."""
