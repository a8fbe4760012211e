"""Batches are a function of (seed, step) on any number of workers."""

import dataclasses
import functools
import pickle
import sys

import cloudpickle
import numpy as np
import pytest

from deeplab_jax import data
from deeplab_jax.config import MIXES, AugmentConfig, DataConfig, ShapesConfig
from deeplab_jax.data import pipeline, randomness
from deeplab_jax.data.augment import crop_matrix, warp
from deeplab_jax.data.dataset import Dataset, read_example
from deeplab_jax.data.labels import IGNORE, named
from deeplab_jax.utils.errors import UserError

# Workers cannot always import the modules of tests.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

FILL = np.array([124, 116, 104], np.uint8)


def shapes_config(**fields):
    shapes = ShapesConfig(size=32, num_train=10, num_eval=10)
    return DataConfig(name="shapes", crop_size=(24, 20), shapes=shapes, num_workers=0, **fields)


def first_batches(count, config=None, **kwargs):
    config = config or shapes_config()
    kwargs = {"batch_size": 4, "seed": 3, "start_step": 0} | kwargs
    with pipeline.train_batches(data.load(config, "train"), config, **kwargs) as batches:
        return [next(batches) for _ in range(count)]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


class Numbered:
    """Images of given sizes, each filled with its index."""

    def __init__(self, sizes, channels=3):
        self._sizes, self._channels = sizes, channels

    def __len__(self):
        return len(self._sizes)

    def __getitem__(self, index):
        height, width = self._sizes[index]
        return {
            "image": np.full((height, width, self._channels), index, np.uint8),
            "label": np.full((height, width), index, np.uint8),
            "name": f"image {index}",
        }


class Recording(Numbered):
    """Lists the indices that are read."""

    def __init__(self, sizes):
        super().__init__(sizes)
        self.read = []

    def __getitem__(self, index):
        self.read.append(index)
        return super().__getitem__(index)


def numbered(*sizes, channels=3):
    return Dataset(Numbered(sizes, channels), named(*map(str, range(250))), channels)


class Damaged(Numbered):
    """The image of index 2 cannot be read."""

    def __getitem__(self, index):
        if index == 2:
            raise UserError("picture.jpg: the file is truncated")
        return super().__getitem__(index)


# The training sequence.


def test_random_numbers_stay_what_they_are():
    """A run resumed under another version of NumPy reads on where it stopped."""
    assert randomness.permutation(10, 0, 0).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert randomness.permutation(10, 0, 1).tolist() == [8, 7, 4, 2, 6, 5, 9, 0, 1, 3]
    assert randomness.permutation(10, 1, 0).tolist() == [3, 5, 2, 9, 7, 0, 8, 6, 1, 4]
    draws = randomness.generator(7, randomness.AUGMENT, 123456789012).random(2)
    assert draws.tolist() == [0.0388368663500297, 0.4823140315957598]


def test_seeds_streams_and_indices_have_their_own_numbers():
    draws = {
        float(randomness.generator(seed, stream, index).random())
        for seed in (0, 1, -1, 2**63 + 1, 2**63 + 2)
        for stream in (randomness.ORDER, randomness.AUGMENT)
        for index in (0, 1, 2**40)
    }
    assert len(draws) == 5 * 2 * 3


@pytest.mark.parametrize("size", [1, 10, 1000])
def test_an_epoch_shows_each_example_once(size):
    orders = [randomness.permutation(size, 5, epoch) for epoch in range(3)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(size))
    if size > 1:
        assert (orders[0] != orders[1]).any()
        assert (orders[1] != orders[2]).any()


def test_batches_run_through_the_epochs():
    """10 examples in batches of 4: rows 0..9, 10..19, ... are permutations of the examples."""
    dataset = numbered(*[(24, 20)] * 10)
    config = shapes_config(flip=False, scale_range=(1.0, 1.0))
    with pipeline.train_batches(dataset, config, batch_size=4, seed=1, start_step=0) as batches:
        shown = np.concatenate([next(batches)["label"][:, 0, 0] for _ in range(10)])
    for epoch in range(4):
        np.testing.assert_array_equal(
            shown[10 * epoch : 10 * epoch + 10], randomness.permutation(10, 1, epoch)
        )


def test_batch_format():
    (batch,) = first_batches(1)
    assert batch["image"].shape == (4, 24, 20, 3)
    assert batch["label"].shape == (4, 24, 20)
    assert batch["image"].dtype == batch["label"].dtype == np.uint8
    assert type(batch["image"]) is np.ndarray


def test_seed_and_step_matter():
    """10 examples are seen again every 2.5 steps, but never in the same crops."""
    batches = [*first_batches(6), *first_batches(6, seed=4)]
    crops = [crop.tobytes() for batch in batches for crop in batch["image"]]
    assert len(set(crops)) == len(crops)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(num_workers):
    config = augmented_config("cutmix")
    expected = first_batches(5, config, start_step=7)
    config.num_workers = num_workers
    assert_same(expected, first_batches(5, config, start_step=7))


def augmented_config(mix, **fields):
    """A config with all augmentations on."""
    augmentation = AugmentConfig(
        photometric=0.8,
        color_jitter=0.4,
        gray=0.3,
        blur=0.5,
        rotation=20.0,
        max_class_share=0.75,
        mix=mix,
    )
    return shapes_config(augment=dataclasses.replace(augmentation, **fields))


@pytest.mark.parametrize("mix", ["", *MIXES])
def test_batches_depend_only_on_seed_and_step(mix):
    """Not on the step at which a run resumes, nor on the number of hosts or the batch size."""
    config = augmented_config(mix)
    whole = first_batches(5, config)
    assert_same(whole, first_batches(5, config))
    assert_same(whole[3:], first_batches(2, config, start_step=3))
    for num_hosts in (2, 4):
        hosts = np.arange(4).reshape(num_hosts, -1)
        parts = zip(*(first_batches(5, config, rows=rows) for rows in hosts), strict=True)
        joined = [{k: np.concatenate([one[k] for one in step]) for k in step[0]} for step in parts]
        assert_same(whole, joined)
    larger = first_batches(2, config, batch_size=8)
    for name in ("image", "label"):
        ours = np.concatenate([batch[name] for batch in whole[:4]])
        np.testing.assert_array_equal(ours, np.concatenate([batch[name] for batch in larger]))
    assert (whole[0]["image"] != first_batches(1, config, seed=4)[0]["image"]).any()


def test_without_augmentations_crops_are_those_of_four_draws():
    """A plain loop: a scale, the crop's place and a flip, and nothing else."""
    dataset = data.load(shapes_config(), "train")
    (batch,) = first_batches(1, start_step=4)
    for row, position in enumerate(range(16, 20)):
        example = dataset.source[randomness.permutation(10, 3, position // 10)[position % 10]]
        draws = randomness.generator(3, randomness.AUGMENT, position).random(4)
        scale = 0.5 + 1.5 * draws[0]
        top, left = (
            int(draw * (max(int(scale * 32) - side, 0) + 1))
            for draw, side in zip(draws[1:3], (24, 20), strict=True)
        )
        matrix = crop_matrix(scale, top, left, 20, draws[3] < 0.5)
        image, label = warp(example["image"], example["label"], matrix, (24, 20), FILL)
        np.testing.assert_array_equal(batch["image"][row], image)
        np.testing.assert_array_equal(batch["label"][row], label)


def test_colours_leave_labels_and_places_as_they_are():
    config = shapes_config(augment=AugmentConfig(gray=1.0))
    for plain, ours in zip(first_batches(3), first_batches(3, config), strict=True):
        np.testing.assert_array_equal(plain["label"], ours["label"])
        grey = plain["image"] @ np.array([0.299, 0.587, 0.114])
        np.testing.assert_allclose(ours["image"], grey[..., None].repeat(3, -1), atol=0.51)


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_crops_are_mixed_with_crops_of_any_example(probability):
    """Images hold their index, so the ids of a row tell which two examples it is made of."""
    dataset = numbered(*[(24, 20)] * 10)
    config = shapes_config(flip=False, scale_range=(1.0, 1.0))
    config.augment = AugmentConfig(mix="cutmix", mix_probability=probability)
    with pipeline.train_batches(dataset, config, batch_size=100, seed=1, start_step=0) as batches:
        batch = [next(batches) for _ in range(5)]
    others = []
    for step, row in np.ndindex(5, 100):
        label, image = batch[step]["label"][row], batch[step]["image"][row]
        np.testing.assert_array_equal(image, label[:, :, None].repeat(3, 2))
        base = randomness.permutation(10, 1, (100 * step + row) // 10)[row % 10]
        assert (label == base).any()
        others += set(np.unique(label)) - {base}
    # One in ten is mixed with itself.
    expected = 450 * probability
    assert len(others) == pytest.approx(expected, abs=4 * np.sqrt(500 / 4) if probability else 0)
    if probability:
        assert set(others) == set(range(10))


# Evaluation.


def square(size):
    return functools.partial(pipeline.square_shape, size=size)


@pytest.mark.parametrize(("batch_size", "num_hosts"), [(4, 1), (4, 2), (16, 4)])
def test_each_image_is_evaluated_once(batch_size, num_hosts):
    source = Recording([(5 + index, 20 - index) for index in range(10)])
    dataset = Dataset(source, numbered().labels)
    share, seen = batch_size // num_hosts, []
    for host in range(num_hosts):
        source.read.clear()
        batches = list(
            pipeline.eval_batches(
                dataset,
                batch_size=batch_size,
                shape=square(24),
                rows=range(host * share, (host + 1) * share),
                fill=FILL,
            )
        )
        assert len(batches) == pipeline.num_eval_batches(dataset, batch_size)
        own = [index for batch in batches for index in batch["index"] if index >= 0]
        assert sorted(source.read) == own
        for batch in batches:
            names = [f"image {index}" if index >= 0 else "" for index in batch["index"]]
            assert batch["name"].tolist() == names
            assert batch["image"].shape == (share, 24, 24, 3)
            assert batch["label"].shape == (share, 24, 24)
            assert batch["index"].dtype == np.int32
            seen += batch["index"].tolist()
            for row, index in enumerate(batch["index"]):
                image, label = batch["image"][row], batch["label"][row]
                inside = np.zeros((24, 24), bool)
                if index >= 0:
                    inside[: 5 + index, : 20 - index] = True
                assert (image[inside] == index).all()
                assert (label[inside] == index).all()
                assert (image[~inside] == FILL).all()
                assert (label[~inside] == IGNORE).all()
    assert sorted(index for index in seen if index >= 0) == list(range(10))
    if num_hosts == 1:
        assert [index for index in seen if index >= 0] == list(range(10))


def test_larger_images_get_the_next_larger_side():
    dataset = numbered((24, 10), (25, 10), (10, 257), (10, 258))
    whole, *parts = (
        list(pipeline.eval_batches(dataset, batch_size=2, shape=square(24), rows=rows, fill=FILL))
        for rows in (None, [0], [1])
    )
    sides = [[batch["image"].shape[1] for batch in batches] for batches in (whole, *parts)]
    assert sides == [[257, 513], [24, 257], [257, 513]]
    for row, part in enumerate(parts):  # each host's own, padded to what is largest
        padded = [
            pipeline.pad_batch(batch, (side, side), FILL)
            for batch, side in zip(part, sides[0], strict=True)
        ]
        assert_same(padded, [{k: v[[row]] for k, v in batch.items()} for batch in whole])
    assert [square(513)(1, side)[0] for side in (1, 513, 514, 769, 770)] == [
        *(513, 513, 769, 769, 1025)
    ]


def test_last_batch_that_is_full():
    assert pipeline.num_eval_batches(numbered(*[(4, 4)] * 8), 4) == 2
    batches = pipeline.eval_batches(
        numbered(*[(4, 4)] * 8), batch_size=4, shape=square(8), fill=FILL
    )
    assert [batch["index"].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7]]


# Mistakes.


def test_a_damaged_file_is_the_users_error():
    dataset = Dataset(Damaged([(4, 4)] * 4), named("a", "b", "c", "d"))
    batches = pipeline.eval_batches(dataset, batch_size=1, shape=square(8), fill=FILL)
    assert next(batches)["index"] == [0]
    assert next(batches)["index"] == [1]
    with pytest.raises(UserError) as error:
        next(batches)
    assert str(error.value) == "picture.jpg: the file is truncated"
    with pytest.raises(StopIteration):
        next(batches)


class Given:
    def __init__(self, image, label):
        self._example = {"image": image, "label": label, "name": "it"}

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self._example


@pytest.mark.parametrize(
    ("image_shape", "label_shape", "label_id", "message"),
    [
        (
            (4, 6, 3),
            (4, 6),
            3,
            r"it: the label holds id 3 \(1 pixels\); expected a class \(0 to 2\) or 255",
        ),
        ((4, 6, 3), (4, 6), 254, "it: the label holds id 254"),
        ((4, 6, 3), (6, 4), 0, "it: the label is 4 x 6 pixels, its image 6 x 4"),
        ((4, 6, 4), (4, 6), 0, r"it: the image must be \[height, width, 3\], got \[4, 6, 4\]"),
        ((4, 6), (4, 6), 0, r"it: the image must be \[height, width, 3\], got \[4, 6\]"),
    ],
)
def test_examples_that_cannot_be_used(image_shape, label_shape, label_id, message):
    label = np.zeros(label_shape, np.uint8)
    label[-1, -1] = label_id
    dataset = Dataset(Given(np.zeros(image_shape, np.uint8), label), named("a", "b", "c"))
    with pytest.raises(UserError, match=message):
        read_example(dataset, 0)


@pytest.mark.parametrize("label_id", [0, 2, IGNORE])
def test_examples_that_can(label_id):
    image, label = np.zeros((4, 6, 3), np.uint8), np.full((4, 6), label_id, np.uint8)
    dataset = Dataset(Given(image, label), named("a", "b", "c"))
    assert read_example(dataset, 0)["label"] is label


def test_empty_data_set():
    for make in (
        lambda dataset: pipeline.train_batches(
            dataset, DataConfig(), batch_size=1, seed=0, start_step=0
        ),
        lambda dataset: pipeline.eval_batches(dataset, batch_size=1, shape=square(8), fill=FILL),
    ):
        with pytest.raises(UserError, match="no images"):
            make(numbered())
        with pytest.raises(UserError, match=r"mean has 3 values, but the images have 4 channels"):
            make(numbered((4, 4), channels=4))


def test_mean_pixel():
    assert pipeline.mean_pixel(DataConfig()).tolist() == [124, 116, 104]
    assert pipeline.mean_pixel(DataConfig(mean=(0.0, 1.0))).tolist() == [0, 255]
    assert pipeline.mean_pixel(DataConfig()).dtype == np.uint8


def test_a_source_pickles():
    """What workers get is small: the data set, not its batches."""
    config = shapes_config()
    dataset = data.load(config, "train")
    source = pipeline._TrainSource(dataset, config, batch_size=2, seed=0, rows=range(1))
    assert len(pickle.dumps(source)) < 2000
