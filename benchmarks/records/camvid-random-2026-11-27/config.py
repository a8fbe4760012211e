import pathlib

from deeplab_jax.config.io import from_json


def get_config():
    return from_json(pathlib.Path(__file__).with_name("config.json"))
