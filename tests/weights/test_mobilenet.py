"""MobileNetV3: torchvision's segmentation model and classifier, converted."""

import jax
import numpy as np
import pytest
from flax import nnx

import torch_reference
from deeplab_jax.models.architecture import architecture
from deeplab_jax.models.backbones.mobilenet import MobileNetV3
from deeplab_jax.models.functional import FunctionalModel, Variables
from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights import families, torch_file
from random_modules import abstract_module
from torch_reference import torch

NAME = "torchvision_mobilenet_v3_large"


def functional(**overrides):
    return FunctionalModel(architecture(NAME, **{"num_classes": 21, **overrides}))


def arrays_of(reference):
    return {name: tensor.detach().numpy() for name, tensor in reference.state_dict().items()}


def to_torch(images):
    return torch.tensor(images.transpose(0, 3, 1, 2))


def difference(ours, theirs):
    """The largest, relative to the largest value."""
    theirs = theirs.detach().numpy().transpose(0, 2, 3, 1)
    assert ours.shape == theirs.shape
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


@pytest.fixture(scope="module")
def deeplab():
    return torch_reference.segmentation_model("deeplabv3_mobilenet_v3_large", aux=True)


@pytest.fixture(scope="module")
def classifier():
    return torch_reference.classifier("mobilenet_v3_large")


@pytest.mark.parametrize("aux", [True, False])
def test_every_array_is_used_once_and_written_back_bit_for_bit(deeplab, aux, tmp_path):
    arrays = {n: a for n, a in arrays_of(deeplab).items() if aux or not n.startswith("aux")}
    assert families.architecture_of(arrays) == architecture(NAME, num_classes=21, aux_head=aux)
    model = functional(aux_head=aux)
    (params, batch_stats), report = families.to_model(arrays, model)
    assert {name: array.shape for name, array in (params | batch_stats).items()} == {
        name: leaf.shape for group in model.abstract for name, leaf in group.items()
    }
    counters = [name for name in arrays if name.endswith("num_batches_tracked")]
    assert sorted(name for name, _ in report.used) == sorted(arrays.keys() - set(counters))
    assert [name for name, _ in report.dropped] == counters
    assert (report.replaced, report.missing, report.notes) == ((), (), ())
    back = families.from_model(Variables(params, batch_stats), model.architecture)
    assert {name: torch_reference.array_bits(array) for name, array in back.items()} == {
        name: torch_reference.array_bits(array) for name, array in arrays.items()
    }
    if aux:
        torch_file.write(tmp_path / "back.pth", back)
        loaded = torch.load(tmp_path / "back.pth", weights_only=True)
        deeplab.load_state_dict(loaded, strict=True)


def test_without_the_auxiliary_head_its_arrays_are_dropped(deeplab):
    _, report = families.to_model(arrays_of(deeplab), functional(aux_head=False))
    reasons = {why for name, why in report.dropped if name.startswith("aux_classifier.4")}
    assert reasons == {"belongs to the auxiliary head, which the model does not have"}


@pytest.mark.parametrize(
    ("dtype", "limit", "size"), [("float64", 1e-9, (3, 33, 65)), ("float32", 1e-4, (1, 224, 224))]
)
def test_logits(x64, deeplab, dtype, limit, size):
    model = functional(dtype=dtype)
    variables = families.to_model(arrays_of(deeplab), model).variables
    images = np.random.default_rng(0).normal(size=(*size, 3)).astype(dtype)
    ours, _ = jax.jit(model.apply)(variables, images)
    reference = deeplab.to(getattr(torch, dtype))
    try:
        with torch.no_grad():
            theirs = reference(to_torch(images))
    finally:
        deeplab.float()
    assert ours.keys() == theirs.keys() == {"out", "aux"}
    for head, logits in theirs.items():
        assert difference(ours[head], logits) <= limit, head


class ExactHardSigmoid(torch.nn.Module):
    """torch's own has the float32 1/6 in its gradient, in float64 too.

    With that, the largest difference below is 3e-9 of the largest gradient.
    """

    def forward(self, x):
        return torch.nn.functional.relu6(x + 3) / 6


def test_gradients_in_training(x64):
    reference = torch_reference.segmentation_model("deeplabv3_mobilenet_v3_large", aux=True)
    reference = reference.double().train()
    for module in reference.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(module, torch_reference.torchvision.ops.SqueezeExcitation):
            module.scale_activation = ExactHardSigmoid()
    model = functional(dtype="float64", dropout=0.0)
    variables = families.to_model(arrays_of(reference), model).variables
    rng = np.random.default_rng(0)
    images = rng.normal(size=(4, 33, 49, 3))
    weights = {head: rng.normal(size=(4, 33, 49, 21)) for head in ("out", "aux")}

    theirs = reference(to_torch(images))
    sum((theirs[head] * to_torch(weights[head])).mean() for head in weights).backward()

    @jax.jit
    def gradients(variables):
        def loss(params):
            inputs = jax.numpy.asarray(images)
            apply = model.apply(variables._replace(params=params), inputs, train=True)
            return sum((apply[0][head] * weights[head]).mean() for head in weights)

        return jax.grad(loss)(variables.params)

    ours = families.from_model(Variables(gradients(variables), {}), model.architecture)
    grads = {name: parameter.grad.numpy() for name, parameter in reference.named_parameters()}
    assert ours.keys() == grads.keys()
    scale = max(np.abs(grad).max() for grad in grads.values())
    worst = max(grads, key=lambda name: np.abs(ours[name] - grads[name]).max())
    largest = np.abs(ours[worst] - grads[worst]).max() / scale
    print(f"gradients: {largest:.1e} ({worst})")  # `pytest -rP` shows it
    assert largest <= 1e-11, worst


def test_a_classifier_is_a_backbone(classifier):
    arrays = arrays_of(classifier)
    # A classifier keeps all of its strides; a segmentation model of any output stride takes it.
    model = functional(num_classes=2, output_stride=32)
    (params, batch_stats), report = families.to_model(arrays, model, backbone_only=True)
    assert sorted(params | batch_stats) == sorted(
        name for group in model.abstract for name in group if name.startswith("backbone.")
    )
    assert ("features.4.block.2.fc1.bias", "backbone.block4.squeeze_excite.fc1.bias") in report.used
    dropped = {name for name, _ in report.dropped if not name.endswith("num_batches_tracked")}
    heads = {f"classifier.{place}.{leaf}" for place in (0, 3) for leaf in ("weight", "bias")}
    assert dropped == heads
    assert len(report.used) + len(report.dropped) == len(arrays)
    found = families.recognise(arrays, backbone_only=True)
    assert found.architecture().name == NAME

    graph, *state = nnx.split(
        abstract_module(lambda: MobileNetV3(model.architecture, rngs=nnx.Rngs(0))),
        nnx.Param,
        nnx.BatchStat,
    )
    named = params | batch_stats
    filled = [
        nnx.from_flat_state(
            {
                path: type(variable)(named[".".join(map(str, ("backbone", *path)))])
                for path, variable in nnx.to_flat_state(part)
            }
        )
        for part in state
    ]
    images = np.random.default_rng(0).normal(size=(1, 65, 97, 3)).astype(np.float32)
    features = jax.jit(lambda state, x: nnx.merge(graph, *state)(x))(filled, images)
    with torch.no_grad():
        theirs = classifier.features(to_torch(images))
    assert difference(features[MobileNetV3.out_feature], theirs) <= 1e-4


def test_a_classifier_is_not_a_segmentation_model(classifier):
    with pytest.raises(UserError, match=r"(?s)it is a classifier.*--config\.init\.backbone"):
        families.to_model(arrays_of(classifier), functional())
    with pytest.raises(UserError, match="no DeepLabv3"):
        families.architecture_of(arrays_of(classifier))


def test_loading_it_into_a_resnet_names_it(deeplab, classifier):
    resnet = FunctionalModel(architecture("torchvision_resnet18", num_classes=21))
    with pytest.raises(UserError, match=f"nearest to {NAME} "):
        families.to_model(arrays_of(deeplab), resnet)
    with pytest.raises(UserError, match=f"nearest to {NAME} "):
        families.to_model(arrays_of(classifier), resnet, backbone_only=True)
