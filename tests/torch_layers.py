"""This package's layers in torch, by their own arrays."""

import numpy as np
import torch


def to_torch(x):
    return torch.tensor(np.asarray(x).transpose(0, 3, 1, 2))


def from_torch(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


def conv2d(x, conv):
    """An `nnx.Conv` with symmetric padding."""
    kernel = torch.tensor(np.asarray(conv.kernel[...]).transpose(3, 2, 0, 1))
    bias = None if conv.bias is None else torch.tensor(np.asarray(conv.bias[...]))
    rate = conv.kernel_dilation[0]
    padding, groups = rate * (kernel.shape[2] // 2), x.shape[1] // kernel.shape[1]
    return torch.nn.functional.conv2d(x, kernel, bias, conv.strides, padding, rate, groups)


def batch_norm(x, norm):
    """A batch norm by its running statistics."""
    variables = (norm.mean, norm.var, norm.scale, norm.bias)
    arrays = (torch.tensor(np.asarray(variable[...])) for variable in variables)
    return torch.nn.functional.batch_norm(x, *arrays, eps=norm.epsilon)


def conv_norm_relu(x, layer):
    """A `ConvBN` with relu."""
    if layer.depthwise is not None:
        x = conv2d(x, layer.depthwise)
    return batch_norm(conv2d(x, layer.conv), layer.bn).relu()


def resize(x, size, align_corners=False):
    options = {"mode": "bilinear", "align_corners": align_corners}
    return torch.nn.functional.interpolate(x, size=size, **options)
