"""Whole evaluations: each image once on any devices, and each protocol against a plain loop."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import confusion_matrix as reference
from sklearn.metrics import roc_auc_score

import torch_reference
from deeplab_jax import config as config_lib
from deeplab_jax.config import Config, DataConfig, EvalConfig, MeshConfig
from deeplab_jax.config.rules import validate
from deeplab_jax.data import pipeline
from deeplab_jax.data.dataset import Dataset
from deeplab_jax.data.labels import IGNORE, named
from deeplab_jax.distributed import mesh as mesh_lib
from deeplab_jax.distributed.mesh import make_mesh
from deeplab_jax.evaluation import protocols
from deeplab_jax.evaluation.confusion import count_boundary
from deeplab_jax.evaluation.evaluator import Evaluator
from deeplab_jax.inference.padding import bucket
from deeplab_jax.inference.positive import PositiveClass
from deeplab_jax.inference.predictor import Predictor, TestTimeAugmentation
from deeplab_jax.models.architecture import architecture
from deeplab_jax.models.functional import FunctionalModel, normalize
from deeplab_jax.utils.errors import UserError
from random_modules import random_variables

CLASSES = 4
SIZES = ((40, 50), (65, 33), (50, 40), (40, 50), (33, 65), (1, 1), (64, 65), (50, 40), (40, 50))
MEAN = np.array([124, 116, 104], np.uint8)


class Images:
    """Images of noise in patches, some pixels ignored."""

    def __init__(self, sizes):
        self._sizes = sizes

    def __len__(self):
        return len(self._sizes)

    def __getitem__(self, index):
        height, width = self._sizes[index]
        rng = np.random.default_rng(index)
        coarse = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        label = rng.integers(0, CLASSES, coarse.shape[:2]).astype(np.uint8)
        label[rng.random(label.shape) < 0.1] = IGNORE
        image, label = (x.repeat(8, 0).repeat(8, 1)[:height, :width] for x in (coarse, label))
        return {"image": image, "label": label, "name": f"image {index}"}


def dataset(sizes=SIZES):
    return Dataset(Images(sizes), named("background", "a", "b", "c"))


class ByPixel:
    """In a model's place: the class follows from a pixel and the sum of its image's pixels, so
    that padding that the model saw, or another image's pixels, would show."""

    architecture = architecture("paper_resnet18", num_classes=CLASSES)
    is_fused = False

    def using(self, implementation):
        return self

    @property
    def fused(self):
        return self

    def fuse(self, variables):
        return variables

    def apply(self, variables, images, *, sizes=None):
        # Sums of whole numbers, exact in any order; 3 a pixel lets the padding be seen.
        whole = jnp.round(images * 16).sum(-1) + 3
        if sizes is not None:
            rows, columns = (jnp.arange(side) for side in images.shape[1:3])
            inside = (rows < sizes[:, :1])[:, :, None] & (columns < sizes[:, 1:])[:, None]
            whole = jnp.where(inside, whole, 0)
        values = whole + whole.sum((1, 2), keepdims=True)
        return {"out": jax.nn.one_hot(values.astype(jnp.int32) % CLASSES, CLASSES)}, {}


class Smooth(ByPixel):
    """Logits that follow smoothly from the pixel, for what is resized, and from its column, for
    what is mirrored or cut into windows."""

    def apply(self, variables, images, *, sizes=None):
        weights = np.random.default_rng(0).normal(size=(4, CLASSES)).astype(np.float32)
        columns = jnp.arange(images.shape[2])[:, None] / 10
        return {"out": 3 * images @ weights[:3] + columns * weights[3]}, {}


@functools.cache
def real_network():
    """A narrow network, random, and its arrays."""
    network = FunctionalModel(architecture("paper_resnet18", num_classes=CLASSES, width=0.125))
    return network, random_variables(network, seed=1)


def evaluator(model, data, *, devices=1, positive=None, **fields):
    settings = {"size": 65, "batch_size": 3, "num_pictures": 0} | fields
    config = Config(
        data=DataConfig(name="shapes"),
        eval=EvalConfig(**settings),
        mesh=MeshConfig(data=devices),
    )
    validate(config)
    return Evaluator(model, data, config, make_mesh(config.mesh), positive)


def count(label, ids):
    valid = label != IGNORE
    if not valid.any():
        return np.zeros((CLASSES, CLASSES), int)
    return reference(label[valid], ids[valid], labels=range(CLASSES))


def images_by_hand(data, protocol):
    """(image, label) as the protocol gives them to the model, padded only if it sees padding."""
    for index in range(len(data.source)):
        example = data.source[index]
        if protocol == "torchvision":
            example = protocols.PROTOCOLS["torchvision"].prepare(example)
        image, label = example["image"], example["label"]
        if protocol == "paper":
            padded = np.full((65, 65, 3), MEAN)
            padded[: label.shape[0], : label.shape[1]] = image
            image = padded
        yield image, label


def predicted_by_hand(model, variables, image):
    pixels = normalize(jnp.asarray(image[None]), DataConfig().mean, DataConfig().std)
    outputs, _ = jax.jit(model.apply)(variables, pixels)
    return np.asarray(outputs["out"][0]).argmax(-1)


def outcomes_by_hand(model, variables, data, protocol):
    """(label, ids) of each image, predicted on its own."""
    outcomes = []
    for image, label in images_by_hand(data, protocol):
        height, width = label.shape
        ids = predicted_by_hand(model, variables, image)[:height, :width]
        outcomes.append((label, ids.astype(np.uint8)))
    return outcomes


def matrices_of(outcomes):
    return np.stack([count(label, ids) for label, ids in outcomes])


PIXELS, DATA = ByPixel(), dataset()


@functools.cache
def pixels_by_hand(protocol):
    return outcomes_by_hand(PIXELS, None, DATA, protocol)


@pytest.mark.parametrize("protocol", ["paper", "native"])
@pytest.mark.parametrize(
    ("batch_size", "devices"),
    # A batch grows to what the devices divide: 4 on 2 is 3 on 2, and 3 or 4 on 8 is 8.
    [(1, 1), (3, 1), (4, 1), (8, 1), (1, 2), (3, 2), (8, 2), (1, 8), (8, 8)],
)
def test_each_image_counts_once_on_any_devices_in_any_batches(batch_size, devices, protocol):
    ours = evaluator(PIXELS, DATA, devices=devices, batch_size=batch_size, protocol=protocol)
    evaluation = ours.evaluate(None, per_image=True)
    expected = matrices_of(pixels_by_hand(protocol))
    np.testing.assert_array_equal(evaluation.matrices, expected)
    np.testing.assert_array_equal(evaluation.matrix, expected.sum(0))
    assert evaluation.num_images == len(SIZES)
    assert ours.num_compilations == 1


def test_the_protocols_differ_where_padding_is_seen():
    paper, native = map(pixels_by_hand, ("paper", "native"))
    changed = [np.any(a != b) for (_, a), (_, b) in zip(paper, native, strict=True)]
    assert sum(changed) >= 6


@pytest.mark.parametrize("protocol", ["paper", "native"])
def test_a_network_gives_in_batches_what_it_gives_image_by_image(protocol):
    """Sharded over devices; a few pixels whose classes are even may turn by rounding."""
    data = dataset(((40, 50), (65, 33), (40, 50), (65, 33), (40, 50)))
    network, variables = real_network()
    evaluation = evaluator(network, data, devices=2, batch_size=4, protocol=protocol).evaluate(
        variables, per_image=True
    )
    expected = matrices_of(outcomes_by_hand(network, variables, data, protocol))
    assert (expected.sum((0, 1)) > 100).sum() >= 3  # of the classes, predicted
    assert np.abs(evaluation.matrices - expected).sum() <= 6


def test_boundaries_and_predictions_are_of_the_images_without_their_padding():
    ours = evaluator(PIXELS, DATA, devices=2, batch_size=4, num_pictures=3)
    evaluation = ours.evaluate(None, boundary=True)
    by_hand = pixels_by_hand("paper")
    expected = sum(count_boundary(label, ids, CLASSES) for label, ids in by_hand)
    np.testing.assert_array_equal(evaluation.boundary_counts, expected)
    assert evaluation.matrices is None
    assert [p.name for p in evaluation.predictions] == ["image 0", "image 1", "image 2"]
    for index, (prediction, (label, ids)) in enumerate(
        zip(evaluation.predictions, by_hand, strict=False)
    ):
        np.testing.assert_array_equal(prediction.image, DATA.source[index]["image"])
        np.testing.assert_array_equal(prediction.label, label)
        np.testing.assert_array_equal(prediction.ids, ids)


class Labels:
    """Images whose label holds the classes of one entry each, in stripes."""

    def __init__(self, classes):
        self._classes = classes

    def __len__(self):
        return len(self._classes)

    def __getitem__(self, index):
        label = np.resize(np.array(self._classes[index], np.uint8), (40, 50))
        image = np.full((40, 50, 3), index, np.uint8)
        return {"image": image, "label": label, "name": str(index)}


@pytest.mark.parametrize(
    ("num_pictures", "expected"),
    [(1, [20]), (3, [10, 20, 31]), (6, [11, 20, 21, 22, 23, 31]), (33, range(33))],
)
@pytest.mark.parametrize("fields", [{}, {"protocol": "native", "window": 33}], ids=str)
def test_pictures_show_different_classes(num_pictures, expected, fields):
    """Ten images of one class come first; class 3 only occurs in one image near the end."""
    classes = [[0]] * 10 + [[1, IGNORE]] * 10 + [[0, 1]] * 11 + [[3]] + [[0]]
    data = Dataset(Labels(classes), named("background", "a", "b", "c"))
    ours = evaluator(PIXELS, data, num_pictures=num_pictures, **fields)
    first, again = (ours.evaluate(None).predictions for _ in range(2))
    assert [prediction.name for prediction in first] == [str(index) for index in expected]
    for one, other in zip(first, again, strict=True):
        assert (one.image == int(one.name)).all()
        np.testing.assert_array_equal(one.label, data.source[int(one.name)]["label"])
        jax.tree.map(np.testing.assert_array_equal, one[1:], other[1:])
        assert one.ids.base is None  # no view, which would keep the batch in memory


def test_ids_are_fetched_for_few_images_only(monkeypatch):
    """Of a long split, each image of which would do for a picture."""
    fetched, rows = [], mesh_lib.addressable_rows
    monkeypatch.setattr(mesh_lib, "addressable_rows", lambda x: fetched.append(1) or rows(x))
    classes = [[index % 3, 3] for index in range(60)]
    data = Dataset(Labels(classes), named("background", "a", "b", "c"))
    evaluation = evaluator(PIXELS, data, batch_size=1, num_pictures=6).evaluate(None)
    assert sorted(prediction.label[0, 0] for prediction in evaluation.predictions) == [
        *(0, 0, 1, 1, 2, 2)
    ]
    assert len(fetched) == 6


@pytest.mark.parametrize(
    ("protocol", "window", "overlap"),
    [("paper", 0, 0.5), ("native", 0, 0.5), ("native", 48, 0.75)],
)
def test_scales_mirror_images_and_windows_are_those_of_inference(protocol, window, overlap):
    """`Predictor` predicts one image after the other; it has tests of its own."""
    model, data = Smooth(), dataset(SIZES[:5])
    fields = {"scales": (0.5, 1.5), "flip": True, "window": window, "overlap": overlap}
    ours = evaluator(model, data, devices=2, protocol=protocol, **fields)
    evaluation = ours.evaluate(None, per_image=True)
    inference = Predictor(
        model,
        None,
        mean=DataConfig().mean,
        std=DataConfig().std,
        tta=TestTimeAugmentation((0.5, 1.5), True, window or None, overlap),
    )
    expected = [
        count(label, inference.ids(image)[: label.shape[0], : label.shape[1]])
        for image, label in images_by_hand(data, protocol)
    ]
    differing = np.abs(evaluation.matrices - expected).sum()
    assert differing <= evaluation.matrix.sum() / 10_000  # even classes turn by rounding
    plain = evaluator(model, data, protocol=protocol).evaluate(None, per_image=True)
    assert np.abs(evaluation.matrices - plain.matrices).sum() > 10 * differing + 100
    if window:
        assert ours.num_compilations == inference.num_compilations


def test_torchvisions_protocol_scores_resized_labels():
    data = dataset([(40, 50), (65, 33)])
    evaluation = evaluator(PIXELS, data, protocol="torchvision").evaluate(None, per_image=True)
    expected = matrices_of(outcomes_by_hand(PIXELS, None, data, "torchvision"))
    np.testing.assert_array_equal(evaluation.matrices, expected)
    assert evaluation.matrix.sum() > 520 * (650 + 1024) / 2


def test_few_programs_are_compiled():
    """One a pair of buckets of height and width, however many sizes there are, and only once."""
    data = dataset([(1 + 10 * i, 30 + 7 * i) for i in range(25)])
    ours = evaluator(PIXELS, data, batch_size=1, protocol="native")
    first = ours.evaluate(None)
    sides = {(bucket(1 + 10 * i), bucket(30 + 7 * i)) for i in range(25)}
    assert ours.num_compilations == len(sides) == 3
    np.testing.assert_array_equal(ours.evaluate(None).matrix, first.matrix)
    assert ours.num_compilations == 3


def test_it_stops_on_request():
    asked = []
    ours = evaluator(PIXELS, DATA)
    assert (
        ours.evaluate(None, should_stop=lambda: len(asked) == 2, progress=lambda: asked.append(1))
        is None
    )
    assert len(asked) == 2


def test_an_image_that_is_counted_twice_is_an_error(monkeypatch):
    batches = pipeline.eval_batches
    monkeypatch.setattr(
        pipeline,
        "eval_batches",
        lambda *args, **kwargs: contextlib.nullcontext([next(batches(*args, **kwargs))] * 3),
    )
    with pytest.raises(RuntimeError, match=r"images \[0, 1, 2, 3.*not counted exactly once"):
        evaluator(PIXELS, DATA).evaluate(None)


@pytest.mark.parametrize("size", [(40, 50), (65, 33), (33, 33), (375, 500), (1, 3), (701, 530)])
@pytest.mark.parametrize("channels", [1, 3])
def test_torchvisions_protocol_resizes_as_torchvision_does(size, channels):
    """Against `SegmentationPresetEval` of its reference scripts, backend "pil"."""
    functional = torch_reference.torchvision.transforms.functional
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*size, channels), dtype=np.uint8)
    label = rng.choice([0, 1, 2, IGNORE], size).astype(np.uint8)
    ours = protocols.PROTOCOLS["torchvision"].prepare(
        {"image": image, "label": label, "name": "it"}
    )
    shown = image[..., 0] if channels == 1 else image  # Pillow's way
    theirs = functional.resize(Image.fromarray(shown), 520, antialias=True)
    nearest = functional.InterpolationMode.NEAREST
    their_label = functional.resize(Image.fromarray(label), 520, interpolation=nearest)
    np.testing.assert_array_equal(ours["image"].reshape(np.shape(theirs)), np.asarray(theirs))
    np.testing.assert_array_equal(ours["label"], np.asarray(their_label))
    assert min(ours["label"].shape) == 520
    assert ours["name"] == "it"


def test_the_config_knows_each_protocol():
    assert ("auto", *protocols.PROTOCOLS) == config_lib.PROTOCOLS


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"protocol": "nativ"}, r"eval.protocol must .*did you mean 'native'.*, got 'nativ'"),
        ({"scales": ()}, "eval.scales must be one or more numbers above 0"),
        ({"scales": (1.0, 0.0)}, "eval.scales must be one or more numbers above 0"),
        ({"window": 31, "protocol": "native"}, r"eval.window must be 0 .* 32 pixels or more"),
        ({"window": 64, "protocol": "paper"}, "eval.window must be 0 under eval.protocol = paper"),
        ({"overlap": 1.0}, r"eval.overlap must be in \[0, 1\)"),
    ],
)
def test_impossible_settings(fields, message):
    with pytest.raises(UserError, match=message):
        validate(Config(eval=EvalConfig(**fields)))


@pytest.mark.parametrize("threshold", [None, 0.3])
@pytest.mark.parametrize(
    ("devices", "fields"),
    [
        (2, {"protocol": "paper"}),
        (8, {"protocol": "native"}),
        (1, {"protocol": "native", "scales": (0.5, 1.5), "flip": True}),
        (1, {"protocol": "native", "window": 48}),
    ],
    ids=str,
)
def test_curves_of_a_class_are_those_of_its_probabilities(devices, fields, threshold):
    """Against scikit-learn, from `Predictor.probabilities` of each image."""
    model, data, positive = Smooth(), dataset(SIZES[:6]), PositiveClass(2, threshold)
    ours = evaluator(model, data, devices=devices, positive=positive, **fields)
    evaluation = ours.evaluate(None, per_image=True)
    tta = TestTimeAugmentation(
        fields.get("scales", (1.0,)), fields.get("flip", False), fields.get("window", 0)
    )
    inference = Predictor(model, None, mean=DataConfig().mean, std=DataConfig().std, tta=tta)
    labels, scores, matrices = [], [], []
    for image, label in images_by_hand(data, fields["protocol"]):
        probabilities = inference.probabilities(image)[: label.shape[0], : label.shape[1]]
        ids = probabilities.argmax(-1)
        if threshold is not None:
            others = np.delete(probabilities, 2, axis=-1).argmax(-1)
            ids = np.where(probabilities[..., 2] >= threshold, 2, np.array([0, 1, 3])[others])
        matrices.append(count(label, ids))
        valid = label != IGNORE
        labels.append(label[valid] == 2)
        scores.append(probabilities[..., 2][valid])
    labels, scores = map(np.concatenate, (labels, scores))
    value, error = evaluation.curves.auroc
    assert error == 0
    assert value == pytest.approx(roc_auc_score(labels, scores), abs=1e-5)
    assert 0.2 < value < 0.8  # neither labels nor scores are constant
    assert evaluation.curves.num_positives == labels.sum()
    assert evaluation.curves.num_negatives == (~labels).sum()
    assert np.abs(evaluation.matrices - matrices).sum() <= len(labels) / 1000  # rounding
    plain = evaluator(model, data, devices=devices, **fields).evaluate(None)
    assert plain.curves is plain.positive_scores is None
    if threshold is None:
        np.testing.assert_array_equal(evaluation.matrix, plain.matrix)
    else:
        assert np.abs(evaluation.matrix - plain.matrix).sum() > len(labels) / 20


def test_without_a_positive_class_no_probabilities_are_computed():
    """Of two classes, too, as in training."""
    network = FunctionalModel(architecture("paper_resnet18", num_classes=2, width=0.125))
    variables = random_variables(network, seed=1)
    ours = evaluator(network, Dataset(DATA.source, named("background", "a")))
    texts = []
    for positive in (None, PositiveClass(1)):
        batch = {
            "image": np.zeros((3, 65, 65, 3), np.uint8),
            "label": np.zeros((3, 65, 65), np.uint8),
            "index": np.zeros(3, np.int32),
            "size": np.full((3, 2), 65, np.int32),
        }
        lowered = jax.jit(functools.partial(ours._evaluate_batch, network.fused, height=65)).lower(
            network.fuse(variables), batch, positive
        )
        texts.append(lowered.as_text())
    assert "exponential" not in texts[0]
    assert "exponential" in texts[1]


def test_thresholds_share_a_program():
    num_classes = DATA.labels.num_classes
    network = FunctionalModel(architecture("paper_resnet18", num_classes=num_classes, width=0.125))
    variables = random_variables(network, seed=1)
    ours = evaluator(network, DATA)
    found, programs = set(), []
    for threshold in (0.0, 0.3, 1.0):
        ours.positive = PositiveClass(1, threshold)
        found.add(int(ours.evaluate(variables).matrix[:, 1].sum()))
        programs.append(ours.num_compilations)
    assert len(found) > 1
    assert programs == [1, 1, 1]
