"""Subclasses of `nnx.Conv` and `nnx.BatchNorm`, and a module of both in sequence."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, DTypeLike, Float

from deeplab_jax.models.ops.batch_norm import normalize_by_batch
from deeplab_jax.models.ops.convolution import fastest_conv

Activation = Callable[[Array], Array]

# He et al. 2015, as in torchvision's ResNets: variance 2 / (k * k * out_features).
HE_FAN_OUT = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
# A new head starts with nearly equal probabilities, and so with a loss of log(num_classes).
SMALL_NORMAL = nnx.initializers.normal(0.01)


def param_dtype(dtype: DTypeLike) -> Any:
    """Returns the dtype of parameters and statistics: float32, or float64 under float64."""
    return jnp.promote_types(dtype, jnp.float32)


def scaled_channels(channels: int, width: float) -> int:
    """Scales a number of channels by a width multiplier; the result is at least 8."""
    return max(8, round(channels * width))


class ShapeRngs(nnx.Rngs):
    """Random keys for a model that only needs shapes, as under `nnx.eval_shape`.

    The layers of this package then use zeros for random kernels, which traces four times as fast.
    """


# Replaces `nnx.Rngs` for initializers that draw no random numbers.
_NO_KEYS: Any = types.SimpleNamespace(params=lambda: None)


class Conv(nnx.Conv):
    """A 2-D `nnx.Conv` with other defaults: those of a ResNet.

    It has no bias, He initialization and float32 parameters under bfloat16. It is computed by
    `models.ops.convolution.fastest_conv`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int = 1,
        strides: int = 1,
        *,
        padding: str = "symmetric",
        kernel_dilation: int = 1,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ) -> None:
        """Takes the arguments of `nnx.Conv`, but for the padding.

        "symmetric" pads with zeros as in torch, and keeps the size at stride 1. "same" is
        TensorFlow's SAME, for an odd kernel and stride 1 or 2. At stride 2 it shifts features by
        one pixel along a side of even size; it is for weights from TensorFlow.

        Raises:
          ValueError: other padding, which would shift features against the image.
        """
        reach = kernel_dilation * (kernel_size - 1)
        if padding not in ("symmetric", "same") or (
            padding == "same" and (reach % 2 or strides > 2)
        ):
            raise ValueError(
                'padding must be "symmetric", or "same" for an odd kernel and stride 1 or 2, got '
                f"{padding!r} for a kernel of {kernel_size} pixels and stride {strides}: other "
                "padding shifts features against the image. Use nnx.Conv if that is what you want"
            )
        shifted = padding == "same" and reach > 0 and strides == 2
        options = {"kernel_init": HE_FAN_OUT, "conv_general_dilated": fastest_conv} | kwargs
        if isinstance(rngs, ShapeRngs):
            options["kernel_init"], rngs = nnx.initializers.zeros, _NO_KEYS
        super().__init__(
            in_features,
            out_features,
            (kernel_size, kernel_size),
            (strides, strides),
            padding="SAME" if shifted else ((reach // 2, reach - reach // 2),) * 2,
            kernel_dilation=(kernel_dilation, kernel_dilation),
            use_bias=options.pop("use_bias", False),
            dtype=jnp.dtype(dtype),
            param_dtype=param_dtype(dtype),
            rngs=rngs,
            **options,
        )


class BatchNorm(nnx.BatchNorm):
    """An `nnx.BatchNorm` over images and pixels, with float32 statistics under bfloat16 too.

    `nnx.BatchNorm` rounds running statistics under bfloat16, and its gradient reads the map once
    more. Here statistics and arithmetic have the dtype of the parameters. Training updates

        running = momentum * running + (1 - momentum) * batch

    so that torch's momentum 0.1 is 0.9 here. The running variance is the biased one, which also
    normalizes the batch; torch's is n / (n - 1) times that. Under `jit` with a sharded batch the
    statistics are those of the global batch. A single value per channel, as in image pooling of one
    image, has variance 0 and is normalized to `bias`.
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
        """Takes arguments of `nnx.BatchNorm`; ignores `rngs`."""
        super().__init__(
            num_features,
            momentum=momentum,
            epsilon=epsilon,
            param_dtype=param_dtype,
            use_running_average=use_running_average,
            rngs=_NO_KEYS,
        )
        if self.mean.dtype != param_dtype:  # nnx.BatchNorm makes them float32
            self.mean = nnx.BatchStat(jnp.zeros(num_features, param_dtype))
            self.var = nnx.BatchStat(jnp.ones(num_features, param_dtype))

    def __call__(  # type: ignore[override]
        self, x: Float[Array, "n h w c"], use_running_average: bool | None = None
    ) -> Float[Array, "n h w c"]:
        """Normalizes by batch statistics and updates the running ones, or by running statistics."""
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
        # Subtracts the mean first, since x * scale + shift loses digits for a large mean.
        values = x.astype(jnp.promote_types(x.dtype, jnp.float32)) - self.mean[...]
        return (values * (scale * lax.rsqrt(self.var[...] + self.epsilon)) + bias).astype(x.dtype)

    def _update(self, running: nnx.BatchStat, batch: Array) -> None:
        batch = lax.stop_gradient(batch)
        running[...] = self.momentum * running[...] + (1 - self.momentum) * batch


def batch_norm(dtype: DTypeLike, momentum: float, epsilon: float) -> Callable[..., BatchNorm]:
    """Returns a function that makes a `BatchNorm` from a number of channels."""
    return functools.partial(
        BatchNorm, momentum=momentum, epsilon=epsilon, param_dtype=param_dtype(dtype)
    )


class ConvBN(nnx.Module):
    """A convolution without a bias, its batch norm, and an activation.

    A separable convolution (arXiv 1802.02611, section 3.1) is a depthwise convolution of the given
    size, stride and dilation (`depthwise`, otherwise None), and a 1x1 convolution (`conv`), with no
    norm between them.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int = 1,
        *,
        norm: Callable[..., BatchNorm] = BatchNorm,
        activation: Activation | None = None,
        separable: bool = False,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        """Makes the layers; `options` are other arguments of `Conv`."""
        options["rngs"] = rngs
        depthwise = None
        if separable:
            groups = options | {"feature_group_count": in_features}
            depthwise = Conv(in_features, in_features, kernel_size, **groups)
            options, kernel_size = {"dtype": options.get("dtype", jnp.float32), "rngs": rngs}, 1
        self.depthwise = depthwise
        self.conv = Conv(in_features, out_features, kernel_size, **options)
        self.bn = norm(out_features)
        self.activation = activation

    def conv_norms(self) -> Sequence[tuple[str, str]]:
        return [("conv", "bn")]

    def __call__(self, x: Float[Array, "n h w cin"]) -> Float[Array, "n ho wo cout"]:
        y = self.bn(self.conv(x if self.depthwise is None else self.depthwise(x)))
        return y if self.activation is None else self.activation(y)


def logits_conv(in_features: int, num_classes: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> Conv:
    """Makes the last convolution of a head: 1x1, with a bias, in float32 under bfloat16."""
    return Conv(
        in_features,
        num_classes,
        use_bias=True,
        kernel_init=SMALL_NORMAL,
        dtype=param_dtype(dtype),
        rngs=rngs,
    )
