"""The config of a run: its fields (`schema`), their rules (`rules`), reading it (`io`)."""

from deeplab_jax.config.schema import DATA_PATHS as DATA_PATHS
from deeplab_jax.config.schema import FREE_FIELDS as FREE_FIELDS
from deeplab_jax.config.schema import IMAGE_LOSSES as IMAGE_LOSSES
from deeplab_jax.config.schema import LOGGERS as LOGGERS
from deeplab_jax.config.schema import PIXEL_LOSSES as PIXEL_LOSSES
from deeplab_jax.config.schema import PROTOCOLS as PROTOCOLS
from deeplab_jax.config.schema import RESUMABLE as RESUMABLE
from deeplab_jax.config.schema import Config as Config
from deeplab_jax.config.schema import DataConfig as DataConfig
from deeplab_jax.config.schema import EvalConfig as EvalConfig
from deeplab_jax.config.schema import FolderConfig as FolderConfig
from deeplab_jax.config.schema import InitConfig as InitConfig
from deeplab_jax.config.schema import LossConfig as LossConfig
from deeplab_jax.config.schema import MeshConfig as MeshConfig
from deeplab_jax.config.schema import ModelConfig as ModelConfig
from deeplab_jax.config.schema import OptimizerConfig as OptimizerConfig
from deeplab_jax.config.schema import SecondStageConfig as SecondStageConfig
from deeplab_jax.config.schema import ShapesConfig as ShapesConfig
from deeplab_jax.config.schema import TrainConfig as TrainConfig
from deeplab_jax.config.schema import crop_shape as crop_shape
from deeplab_jax.config.schema import differences as differences
from deeplab_jax.config.schema import flatten as flatten
from deeplab_jax.config.schema import output_strides as output_strides
from deeplab_jax.config.schema import resolve_eval as resolve_eval
from deeplab_jax.config.schema import to_json as to_json
