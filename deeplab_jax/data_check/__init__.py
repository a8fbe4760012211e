"""`deeplab-jax data check`: finds what is wrong with a folder of images and masks."""
