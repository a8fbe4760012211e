"""torchvision's models and ours on the same weights: numbers, stage by stage, and in training.

Batch norm's statistics and affine parameters are random. Limits are relative to the largest value.
"""

import contextlib
import dataclasses

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import torch_reference
from deeplab_jax.config import Config, DataConfig, MeshConfig, OptimizerConfig
from deeplab_jax.distributed.mesh import make_mesh
from deeplab_jax.models.architecture import ARCHITECTURES, BACKBONES, architecture
from deeplab_jax.models.backbones.resnet import RESNETS, Bottleneck, ResNet, Stages
from deeplab_jax.models.deeplab import build_model
from deeplab_jax.models.functional import FunctionalModel, Variables
from deeplab_jax.training.optimizer import is_decayed
from deeplab_jax.training.state import init_state
from deeplab_jax.training.step import make_train_step
from deeplab_jax.weights import families
from random_modules import abstract_module
from torch_reference import torch

LIMITS = {"float64": 1e-9, "float32": 1e-4}
TORCH_TYPES = {"float64": torch.float64, "float32": torch.float32}


@pytest.fixture(scope="module")
def resnet50():
    return torch_reference.segmentation_model("deeplabv3_resnet50", aux=True)


@pytest.fixture(params=LIMITS)
def dtype(request):
    """Each type of the computation; 64-bit arrays are on where it needs them."""
    jax.config.update("jax_enable_x64", request.param == "float64")
    yield request.param
    jax.config.update("jax_enable_x64", False)


def converted(reference, model, **options):
    arrays = {name: tensor.detach().numpy() for name, tensor in reference.state_dict().items()}
    return families.to_model(arrays, model, **options).variables


def random_images(*shape, dtype="float64"):
    return np.random.default_rng(sum(shape)).normal(size=(*shape, 3)).astype(dtype)


def to_torch(array):
    return torch.from_numpy(np.moveaxis(array, 3, 1).copy())


def difference(ours, theirs):
    """Largest difference of maps, ours `[n, h, w, c]`, over the largest value."""
    theirs = np.moveaxis(theirs.detach().numpy(), 1, 3)
    assert ours.shape == theirs.shape
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


def logit_differences(reference, name, dtype, shape):
    reference = reference.to(TORCH_TYPES[dtype])
    aux_head = reference.aux_classifier is not None
    model = FunctionalModel(architecture(name, num_classes=21, aux_head=aux_head, dtype=dtype))
    images = random_images(*shape, dtype=dtype)
    ours, _ = jax.jit(model.apply)(converted(reference, model), images)
    with torch.no_grad():
        theirs = reference(to_torch(images))
    assert ours.keys() == theirs.keys()
    return {head: difference(ours[head], theirs[head]) for head in theirs}


def test_logits_of_resnet50(resnet50, dtype):
    """Features are 65 long on one side, so that each of ASPP's rates makes a difference there."""
    sides = (65, 513) if dtype == "float64" else (513, 65)
    differences = logit_differences(resnet50, "torchvision_resnet50", dtype, (1, *sides))
    assert max(differences.values()) <= LIMITS[dtype], differences
    assert differences.keys() == {"out", "aux"}


@pytest.mark.parametrize("dtype", ["float64"], indirect=True)
def test_logits_of_resnet101_without_aux(dtype):
    reference = torch_reference.segmentation_model("deeplabv3_resnet101", seed=1)
    differences = logit_differences(reference, "torchvision_resnet101", dtype, (1, 33, 65))
    assert differences["out"] <= LIMITS[dtype]
    assert differences.keys() == {"out"}


# Stage by stage


def module_with(variables, model_architecture):
    abstract = abstract_module(lambda: build_model(model_architecture, rngs=nnx.Rngs(0)))
    for path, variable in nnx.to_flat_state(nnx.state(abstract, (nnx.Param, nnx.BatchStat))):
        name = ".".join(map(str, path))
        group = variables.params if name in variables.params else variables.batch_stats
        if name in group:
            variable.set_value(group[name])
            nnx.update(abstract, nnx.from_flat_state({path: variable}))
    return abstract


@contextlib.contextmanager
def outputs_of(modules):
    """What torch's modules give while they run within."""
    outputs = {}

    def keep(name):
        return lambda module, inputs, output: outputs.__setitem__(name, output.clone())

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    yield outputs
    for handle in handles:
        handle.remove()


def test_stages_of_resnet50(resnet50, dtype):
    reference = resnet50.to(TORCH_TYPES[dtype])
    ours = architecture("torchvision_resnet50", num_classes=21, dtype=dtype)
    graph, state = nnx.split(module_with(converted(reference, FunctionalModel(ours)), ours))

    @jax.jit
    def stages(state, images):
        model = nnx.merge(graph, state)
        features = model.backbone(images)
        aspp = model.classifier.aspp
        branches = [branch(features["layer4"]) for branch in aspp.branches]
        return features | {
            **{f"aspp {index}": branch for index, branch in enumerate(branches)},
            "aspp": aspp(features["layer4"]),
            "classifier": model.classifier(features),
            "aux_classifier": model.aux_classifier(features),
            **model(images),
        }

    backbone, aspp = reference.backbone, reference.classifier[0]
    modules = {f"layer{index}": backbone[f"layer{index}"] for index in range(1, 5)}
    modules |= {f"aspp {index}": branch for index, branch in enumerate(aspp.convs)}
    modules |= {"stem": backbone.maxpool, "aspp": aspp, "classifier": reference.classifier}
    modules |= {"aux_classifier": reference.aux_classifier}
    images = random_images(3, 33, 65, dtype=dtype)
    with outputs_of(modules) as theirs, torch.no_grad():
        theirs |= reference(to_torch(images))
    found = stages(state, images)
    assert found.keys() == theirs.keys()
    differences = {name: difference(found[name], theirs[name]) for name in theirs}
    assert max(differences.values()) <= LIMITS[dtype], differences


@pytest.mark.parametrize("depth", [18, 34])
def test_stages_of_classifiers(depth, dtype):
    reference = torch_reference.classifier(f"resnet{depth}").to(TORCH_TYPES[dtype])
    ours = architecture(f"torchvision_resnet{depth}", num_classes=2, dtype=dtype, output_stride=32)
    variables = converted(reference, FunctionalModel(ours), backbone_only=True)
    assert all(name.startswith("backbone.") for group in variables for name in group)
    backbone = module_with(variables, ours).backbone
    graph, state = nnx.split(backbone)
    modules = {f"layer{i}": getattr(reference, f"layer{i}") for i in range(1, 5)}
    images = random_images(2, 65, 97, dtype=dtype)
    with outputs_of(modules | {"stem": reference.maxpool}) as theirs, torch.no_grad():
        reference(to_torch(images))
    found = jax.jit(lambda state, images: nnx.merge(graph, state)(images))(state, images)
    differences = {name: difference(found[name], theirs[name]) for name in found}
    assert max(differences.values()) <= LIMITS[dtype], differences


# Training

STEPS = 5
BATCH = (4, 33, 41)
# A ResNet-50 in all but its number of blocks. With so few values to each batch norm, a hundred
# layers make rounding grow tenfold a step; these twenty do not.
NUM_BLOCKS = (1, 1, 2, 2)


def training_config():
    return Config(
        data=DataConfig(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        # A constant rate that float32, in which the schedule is computed, represents exactly.
        optimizer=OptimizerConfig(learning_rate=2**-7, power=0.0, momentum=0.9, weight_decay=1e-4),
        mesh=MeshConfig(data=1),
    )


def training_batch():
    """Pixels are 0 or 255, normalized to -1 and 1: the same number in each precision."""
    generator = np.random.default_rng(5)
    labels = generator.integers(0, 21, BATCH).astype(np.uint8)
    labels[generator.random(BATCH) < 0.1] = 255
    images = 255 * generator.integers(0, 2, (*BATCH, 3))
    return {"image": images.astype(np.uint8), "label": labels}


def train_torch(reference, config, batch):
    """Trains in place; the first step's gradients, and elements a channel of each batch norm."""
    counts = {}
    for name, module in reference.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: counts.__setitem__(
                    name, inputs[0].numel() // inputs[0].shape[1]
                )
            )
    kernels = [p for p in reference.parameters() if p.ndim == 4]
    others = [p for p in reference.parameters() if p.ndim != 4]
    optimizer = torch.optim.SGD(
        [{"params": kernels, "weight_decay": config.optimizer.weight_decay}, {"params": others}],
        lr=config.optimizer.learning_rate,
        momentum=config.optimizer.momentum,
    )
    images = to_torch(batch["image"] / 127.5 - 1)
    labels = torch.from_numpy(batch["label"].astype(np.int64))
    first = {}
    reference.train()
    for step in range(STEPS):
        outputs = reference(images)
        losses = {
            head: torch.nn.functional.cross_entropy(logits, labels, ignore_index=255)
            for head, logits in outputs.items()
        }
        optimizer.zero_grad()
        (losses["out"] + config.loss.aux_weight * losses["aux"]).backward()
        if step == 0:
            first = {name: p.grad.numpy().copy() for name, p in reference.named_parameters()}
        optimizer.step()
    return first, counts


def relative(ours, theirs):
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.fixture
def shallow(monkeypatch, x64):
    """A reference and the model for it."""
    monkeypatch.setitem(RESNETS, "shallow", Stages(Bottleneck, NUM_BLOCKS))
    monkeypatch.setitem(BACKBONES, "shallow", ResNet)
    ours = dataclasses.replace(
        ARCHITECTURES["torchvision_resnet50"], backbone="shallow", dtype="float64", dropout=0.0
    )
    reference = torch_reference.shallow_segmentation_model(NUM_BLOCKS).double()
    return reference, FunctionalModel(ours)


def test_five_steps_of_training_equal_torch(shallow):
    config, batch = training_config(), training_batch()
    reference, model = shallow
    start = converted(reference, model)
    grads, counts = train_torch(reference, config, batch)
    theirs = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}

    state = init_state(config, jax.tree.map(jax.numpy.asarray, start))
    step = make_train_step(model, config, make_mesh(config.mesh))
    for index in range(STEPS):
        state, _ = step(state, batch)
        if index == 0:  # the momentum is now the gradient and the weight decay's part
            trace = optax.tree.get(state.opt_state, "trace")
            our_grads = {
                name: np.asarray(value)
                - is_decayed(name) * config.optimizer.weight_decay * start.params[name]
                for name, value in trace.items()
            }
    began, ours = (
        families.from_model(each, model.architecture) for each in (start, state.variables)
    )
    our_grads = families.from_model(Variables(our_grads, {}), model.architecture)

    assert our_grads.keys() == grads.keys()
    gradients = {name: relative(our_grads[name], grad) for name, grad in grads.items()}
    after = {}
    kept = 0.9**STEPS  # of the running statistics
    for name, value in theirs.items():
        if name.endswith("num_batches_tracked"):
            continue
        if name.endswith("running_var"):
            # torch moves it towards the unbiased variance: n / (n - 1) times ours, at each step.
            layer = name.removesuffix(".running_var")
            before = kept * began[name]
            value = before + (value - before) * (counts[layer] - 1) / counts[layer]
        after[name] = relative(ours[name], value)

    show("gradients of step 1", gradients)
    for kind in ("running_mean", "running_var"):
        show(f"{kind} after {STEPS} steps", {k: v for k, v in after.items() if k.endswith(kind)})
    parameters = {name: value for name, value in after.items() if name in grads}
    show(f"parameters after {STEPS} steps", parameters)
    assert max(gradients.values()) <= 1e-9, gradients
    assert max(after.values()) <= 1e-8, after


def show(what, differences):
    """Prints the largest, which `pytest -rP` shows: `docs/numerics.md` quotes it."""
    name = max(differences, key=differences.__getitem__)
    print(f"{what}: {differences[name]:.1e} ({name})")
