"""Fusing batch norm into convolutions for inference."""

from __future__ import annotations

from flax import nnx
from jaxtyping import Array


class Identity(nnx.Module):
    """Replaces a batch norm that was fused into its convolution."""

    def __call__(self, x: Array) -> Array:
        return x


def fuse_batch_norm(module: nnx.Module) -> None:
    """Fuses batch norms, by their running statistics, into the preceding convolutions, in place.

    The module then gives the same result up to rounding: each convolution has a scaled kernel and a
    bias, and `Identity` takes the place of the norm. It cannot be trained any more.

    Fuses the pairs that a submodule lists in its method `conv_norms()`: the names of two of its
    attributes, a convolution and the norm that directly follows it. Other norms stay.
    """
    for _, part in list(nnx.iter_modules(module)):
        if not hasattr(part, "conv_norms"):
            continue
        for conv_name, norm_name in part.conv_norms():
            conv, norm = getattr(part, conv_name), getattr(part, norm_name)
            if isinstance(norm, Identity):
                continue
            scale = (norm.var.get_value() + norm.epsilon) ** -0.5
            if norm.scale is not None:
                scale = norm.scale.get_value() * scale
            bias = -norm.mean.get_value() * scale
            if norm.bias is not None:
                bias = norm.bias.get_value() + bias
            if conv.bias is not None:
                bias = bias + conv.bias.get_value() * scale
            conv.kernel = nnx.Param(conv.kernel.get_value() * scale)
            conv.bias = nnx.Param(bias)
            conv.use_bias = True
            setattr(part, norm_name, Identity())
