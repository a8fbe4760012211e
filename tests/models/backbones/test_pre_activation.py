"""Full pre-activation against a float64 reference, written from He et al. 2016 with torch.

arXiv 1603.05027, equations 1 and 2 and figure 4(e): x' = x + F(relu(norm(x))), and the sum is left
as it is. Its appendix: for the first unit "we adopt the first activation right after conv1 and
before splitting into two paths", for the last one "an extra activation right after its element-wise
addition". Where channels or size change the shortcut is a convolution of the first activation, as
in the authors' code.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch.nn.functional import batch_norm, conv2d, max_pool2d

from deeplab_jax.models.architecture import architecture
from deeplab_jax.models.backbones import resnet
from deeplab_jax.models.backbones.resnet import BasicBlock, Bottleneck, ResNet, Stages
from deeplab_jax.models.layers import ShapeRngs
from random_modules import random_module

NUM_UNITS = (1, 1, 1, 2)  # every kind of unit: the first, with and without a projection
MULTI_GRID = (1, 3)
MOMENTUM = 0.9
# For each output stride and stage: the stride of the first unit, and the rate of all units.
STAGES = {
    32: ((1, 1), (2, 1), (2, 1), (2, 1)),
    16: ((1, 1), (2, 1), (2, 1), (1, 2)),
    8: ((1, 1), (2, 1), (1, 2), (1, 4)),
}


class Reference:
    """The network as functions of torch, on arrays named as ours.

    Attributes:
      arrays: by dotted name; kernels as torch has them.
      train: whether norms are by the batch's statistics, moving the running ones into `moved`.
    """

    def __init__(self, arrays, train):
        self.arrays, self.train, self.moved = arrays, train, {}

    def conv(self, x, name, stride=1, rate=1):
        kernel = self.arrays[f"{name}.kernel"]
        padding = rate * (kernel.shape[2] // 2)
        return conv2d(x, kernel, stride=stride, padding=padding, dilation=rate)

    def activate(self, x, name):
        """relu(norm(x))."""
        scale, bias, *running = (
            self.arrays[f"{name}.{kind}"] for kind in ("scale", "bias", "mean", "var")
        )
        if self.train:
            batch = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
            for kind, old, new in zip(("mean", "var"), running, batch, strict=True):
                self.moved[f"{name}.{kind}"] = MOMENTUM * old + (1 - MOMENTUM) * new.detach()
            running = [None, None]
        return batch_norm(x, *running, scale, bias, training=self.train, eps=1e-5).relu()

    def unit(self, x, name, convs, first):
        """Computes a residual unit; `convs` are the (stride, rate) of its convolutions."""
        activated = x if first else self.activate(x, f"{name}.bn1")
        projects = f"{name}.downsample.kernel" in self.arrays
        shortcut = activated if first else x
        if projects:
            stride = max(stride for stride, _ in convs)
            shortcut = self.conv(activated, f"{name}.downsample", stride)
        y = self.conv(activated, f"{name}.conv1", *convs[0])
        for number, options in enumerate(convs[1:], start=2):
            y = self.conv(self.activate(y, f"{name}.bn{number}"), f"{name}.conv{number}", *options)
        return shortcut + y

    def __call__(self, images, output_stride, bottleneck):
        x = self.activate(self.conv(images, "stem.0.conv", 2), "stem.0.bn")
        x = max_pool2d(x, 3, stride=2, padding=1)
        for stage, (stage_stride, stage_rate) in enumerate(STAGES[output_stride], start=1):
            for index in range(NUM_UNITS[stage - 1]):
                first_stride = stage_stride if index == 0 else 1
                rate = stage_rate * (MULTI_GRID[index] if stage == 4 else 1)
                convs = [(first_stride, rate), (1, rate)]
                if bottleneck:
                    convs = [(1, 1), (first_stride, rate), (1, 1)]
                x = self.unit(x, f"layer{stage}.{index}", convs, (stage, index) == (1, 0))
        return self.activate(x, "final_bn")


def flat(state):
    return {
        ".".join(map(str, path)): np.asarray(variable[...])
        for path, variable in nnx.to_flat_state(state)
    }


def as_torch(name, array):
    return torch.tensor(array.transpose(3, 2, 0, 1) if name.endswith("kernel") else array)


@functools.partial(jax.jit, static_argnums=0)
def ours(graph, params, stats, images, cotangent):
    """Returns inference features, and in training gradients and running statistics."""
    inference = nnx.merge(graph, params, stats)(images)["layer4"]

    def product(params, images):
        module = nnx.merge(graph, params, stats, copy=True)
        module.train()
        features = module(images)["layer4"]
        return jnp.vdot(features, cotangent), (features, nnx.state(module, nnx.BatchStat))

    gradients, (features, moved) = jax.grad(product, argnums=(0, 1), has_aux=True)(params, images)
    return inference, features, moved, gradients


@pytest.mark.parametrize(
    ("block", "output_stride"),
    [(BasicBlock, 8), (Bottleneck, 16), (BasicBlock, 32)],
)
def test_forward_gradients_and_statistics_are_the_papers(x64, monkeypatch, block, output_stride):
    monkeypatch.setitem(resnet.RESNETS, "resnet18", Stages(block, NUM_UNITS))
    chosen = architecture(
        "paper_resnet18", num_classes=2, width=0.125, residual="pre", dtype="float64",
        output_stride=output_stride, bn_momentum=MOMENTUM, multi_grid=MULTI_GRID,
    )  # fmt: skip
    module = random_module(lambda: ResNet(chosen, rngs=ShapeRngs(0)))
    graph, params, stats = nnx.split(module, nnx.Param, nnx.BatchStat)
    # Includes negative scales, with which activation and max pooling do not commute.
    scale = params["stem"][0]["bn"]["scale"]
    scale.set_value(scale.get_value().at[::2].multiply(-1))
    rng = np.random.default_rng(1)
    images = rng.normal(size=(2, 41, 33, 3))
    channels = module.features["layer4"].channels
    shape = (2, -(-41 // output_stride), -(-33 // output_stride), channels)
    cotangent = rng.normal(size=shape)
    inference, features, moved, (gradients, images_gradient) = ours(
        graph, params, stats, images, cotangent
    )

    arrays = {name: as_torch(name, array) for name, array in (flat(params) | flat(stats)).items()}
    weights = {name: arrays[name].requires_grad_() for name in flat(params)}
    x = torch.tensor(images.transpose(0, 3, 1, 2)).requires_grad_()
    bottleneck = block is Bottleneck
    with torch.no_grad():
        expected = Reference(arrays, train=False)(x, output_stride, bottleneck)
    assert_close(inference, expected)
    reference = Reference(arrays, train=True)
    expected = reference(x, output_stride, bottleneck)
    assert_close(features, expected)
    (expected * torch.tensor(cotangent.transpose(0, 3, 1, 2))).sum().backward()
    assert_close(images_gradient, x.grad)
    for name, gradient in flat(gradients).items():
        expected = weights[name].grad.numpy()  # None, and an error, if the paper has no such array
        limit = 1e-9 * max(np.abs(expected).max(), 1)
        np.testing.assert_allclose(as_torch(name, gradient), expected, atol=limit, err_msg=name)
    assert flat(moved).keys() == reference.moved.keys()
    for name, statistic in flat(moved).items():
        np.testing.assert_allclose(statistic, reference.moved[name], rtol=1e-10, atol=1e-12)


def assert_close(ours, theirs):
    theirs = theirs.detach().numpy().transpose(0, 2, 3, 1)
    assert np.abs(theirs).max() > 0.1
    np.testing.assert_allclose(ours, theirs, atol=1e-10 * np.abs(theirs).max())
