"""Layers: `nnx.Conv` and `nnx.BatchNorm` where they must differ, and the two in sequence."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, DTypeLike, Float

from deeplab_jax.models.ops.batch_norm import normalize_by_batch
from deeplab_jax.models.ops.convolution import fastest_conv

Initializer = Callable[..., Array]
Activation = Callable[[Array], Array]

# He et al. 2015, as torchvision initialises its ResNets: variance 2 / (k * k * out_features).
HE_FAN_OUT: Initializer = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
# Small, so that a new head starts with nearly equal probabilities: a loss of log(num_classes).
SMALL_NORMAL: Initializer = nnx.initializers.normal(0.01)


def param_dtype(dtype: DTypeLike) -> Any:
    """Returns the dtype of parameters and statistics: float32, or float64 to compute in float64."""
    return jnp.promote_types(dtype, jnp.float32)


def scaled_channels(channels: int, width: float) -> int:
    """Scales a number of channels by a width multiplier; the result is at least 8."""
    return max(8, round(channels * width))


class ShapeRngs(nnx.Rngs):
    """Random keys for a model of which only the shapes matter, as under `nnx.eval_shape`.

    This package's layers then draw nothing and start at 0, which traces four times as fast.
    """


class _NoKeys:
    """Stands in for `nnx.Rngs` where the initialisers draw nothing."""

    @staticmethod
    def params() -> None:
        return None


_NO_KEYS: Any = _NoKeys()


class Conv(nnx.Conv):
    """A 2-D `nnx.Conv` with the defaults of a ResNet.

    No bias, He's initialisation, float32 parameters under bfloat16, and symmetric zero padding that
    keeps the size at stride 1, as torch pads. (`SAME` is not symmetric at stride 2.) It is computed
    by `models.ops.convolution.fastest_conv`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int = 1,
        strides: int = 1,
        *,
        padding: int | str | Sequence[int | tuple[int, int]] | None = None,
        kernel_dilation: int = 1,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ) -> None:
        """Takes the arguments of `nnx.Conv`.

        Raises:
          ValueError: `padding` is given and would shift features against the image.
        """
        options = {"kernel_init": HE_FAN_OUT, "conv_general_dilated": fastest_conv} | kwargs
        if isinstance(rngs, ShapeRngs):
            options["kernel_init"], rngs = nnx.initializers.zeros, _NO_KEYS
        super().__init__(
            in_features,
            out_features,
            (kernel_size, kernel_size),
            (strides, strides),
            padding=_padding(padding, kernel_dilation * (kernel_size - 1)),
            kernel_dilation=(kernel_dilation, kernel_dilation),
            use_bias=options.pop("use_bias", False),
            dtype=jnp.dtype(dtype),
            param_dtype=param_dtype(dtype),
            rngs=rngs,
            **options,
        )


def _padding(padding: Any, reach: int) -> tuple[tuple[int, int], ...]:
    """Padding of rows and columns for a kernel of `reach + 1` pixels; see `Conv` for the error."""
    around = (reach // 2, reach - reach // 2)
    if padding is None:
        return (around, around)
    sides = [padding, padding] if isinstance(padding, int) else list(padding)
    pads = tuple((each, each) if isinstance(each, int) else tuple(each) for each in sides)
    # An even kernel has no centre: it may begin at its pixel, or lie around it.
    if pads not in ((around, around), ((0, reach),) * 2 if reach % 2 else None):
        raise ValueError(
            f"padding must be {around} on both axes (or left out) for a kernel of {reach + 1} "
            f"pixels, got {padding!r}: another one shifts features against the image, and logits "
            "would be resized to the wrong place. Use nnx.Conv if that is what you want"
        )
    return pads


class BatchNorm(nnx.BatchNorm):
    """`nnx.BatchNorm` over images and pixels, with float32 statistics whatever the input's dtype.

    `nnx.BatchNorm` rounds running statistics under bfloat16, and its derived gradient reads the map
    once more. Here the statistics and the arithmetic have the dtype of the parameters. They move as

        running = momentum * running + (1 - momentum) * batch's

    so torch's momentum 0.1 is 0.9 here. The running variance is the biased one, which also
    normalises the batch; torch's is n / (n - 1) times that. Under `jit` with a sharded batch the
    statistics are those of the whole batch. A single value a channel, as image pooling gives for
    one image, has variance 0 and is normalised to `bias`.
    """

    def __init__(
        self,
        num_features: int,
        *,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        param_dtype: DTypeLike = jnp.float32,
        use_running_average: bool = False,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        """Takes these arguments of `nnx.BatchNorm`; draws nothing from `rngs`."""
        super().__init__(
            num_features,
            momentum=momentum,
            epsilon=epsilon,
            param_dtype=param_dtype,
            use_running_average=use_running_average,
            rngs=_NO_KEYS,
        )
        if self.mean.dtype != param_dtype:  # nnx.BatchNorm has float32 even with float64
            self.mean = nnx.BatchStat(jnp.zeros(num_features, param_dtype))
            self.var = nnx.BatchStat(jnp.ones(num_features, param_dtype))

    def __call__(  # type: ignore[override]
        self, x: Float[Array, "n h w c"], use_running_average: bool | None = None
    ) -> Float[Array, "n h w c"]:
        """Normalises by the batch's statistics and updates the running ones, or by the latter."""
        if use_running_average is None:
            use_running_average = self.use_running_average
        assert self.scale is not None
        assert self.bias is not None
        scale, bias = self.scale[...], self.bias[...]
        if not use_running_average:
            y, mean, var = normalize_by_batch(x, scale, bias, self.epsilon)
            self._update(self.mean, mean)
            self._update(self.var, var)
            return y
        # Not x * scale + shift: for a large mean the shift would cancel it with fewer digits left.
        values = x.astype(jnp.promote_types(x.dtype, jnp.float32)) - self.mean[...]
        return (values * (scale * lax.rsqrt(self.var[...] + self.epsilon)) + bias).astype(x.dtype)

    def _update(self, running: nnx.BatchStat, batch: Array) -> None:
        new = self.momentum * running[...] + (1 - self.momentum) * lax.stop_gradient(batch)
        running[...] = new


def batch_norm(dtype: DTypeLike, momentum: float, epsilon: float) -> Callable[..., BatchNorm]:
    """Returns a function that makes a batch norm for a number of channels."""
    options: dict[str, Any] = {"momentum": momentum, "epsilon": epsilon}
    return functools.partial(BatchNorm, param_dtype=param_dtype(dtype), **options)


class ConvBN(nnx.Module):
    """A convolution `conv` without a bias, its batch norm `bn`, and an activation or None."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int = 1,
        *,
        norm: Callable[..., BatchNorm] = BatchNorm,
        activation: Activation | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        """`options` are those of `Conv`."""
        self.conv = Conv(in_features, out_features, kernel_size, rngs=rngs, **options)
        self.bn = norm(out_features)
        self.activation = activation

    def conv_norms(self) -> Sequence[tuple[str, str]]:
        return [("conv", "bn")]

    def __call__(self, x: Float[Array, "n h w cin"]) -> Float[Array, "n ho wo cout"]:
        y = self.bn(self.conv(x))
        return y if self.activation is None else self.activation(y)


def logits_conv(in_features: int, num_classes: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> Conv:
    """Returns the last convolution of a head: 1x1, with a bias, in float32 under bfloat16."""
    options: dict[str, Any] = {"use_bias": True, "kernel_init": SMALL_NORMAL}
    return Conv(in_features, num_classes, dtype=param_dtype(dtype), rngs=rngs, **options)
