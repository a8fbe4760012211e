"""Which padded shapes are chosen, compared with all ways to share programs."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deeplab_jax.inference.padding import BUCKET, PaddedShape, bucket, plan_shapes

SIDES = st.integers(1, 900)
SIZES = st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=7)
# Height and width of nine photos.
PHOTOS = [
    *((720, 1080), (720, 1080), (300, 451), (962, 640), (426, 640), (810, 1080), (721, 1080)),
    *((853, 1280), (853, 1280)),
]


def plan(sizes, program_pixels=200_000, multiple=8, max_images=1, max_pixels=4_000_000):
    return plan_shapes(
        sizes,
        multiple=multiple,
        program_pixels=program_pixels,
        max_images=max_images,
        max_pixels=max_pixels,
    )


def cost(sizes, planned, program_pixels):
    pixels = sum(planned[size].height * planned[size].width for size in sizes)
    return pixels + program_pixels * len(set(planned.values()))


def partitions(items):
    """All ways to divide items into groups."""
    if not items:
        yield []
        return
    for groups in partitions(items[1:]):
        yield [[items[0]], *groups]
        for i, group in enumerate(groups):
            yield [*groups[:i], [items[0], *group], *groups[i + 1 :]]


def least_cost(sizes, program_pixels):
    """The smallest cost of all ways to share programs, with padded sides of 8 pixels."""
    rounded = [tuple(8 * math.ceil(side / 8) for side in size) for size in sizes]
    return min(
        sum(len(group) * math.prod(map(max, *group, (0, 0))) + program_pixels for group in groups)
        for groups in partitions(rounded)
    )


@given(SIZES, st.integers(0, 500_000))
def test_the_cost_is_near_the_least(sizes, program_pixels):
    found = cost(sizes, plan(sizes, program_pixels), program_pixels)
    best = least_cost(sizes, program_pixels)
    assert best <= found <= 1.15 * best


@given(SIZES, st.sampled_from([1, 8, BUCKET]), st.sampled_from([1, 4, 8]))
def test_every_image_fits_into_its_shape(sizes, multiple, max_images):
    planned = plan(sizes, multiple=multiple, max_images=max_images, max_pixels=1_000_000)
    for height, width in sizes:
        shape = planned[height, width]
        assert shape.height >= height
        assert shape.width >= width
        for side in shape[1:]:
            assert (side - (multiple == BUCKET)) % multiple == 0
        assert shape.num_images in (1, 2, 4, 8)
        assert shape.num_images <= max_images
        assert shape.num_images == 1 or math.prod(shape) <= 1_000_000
        users = sum(planned[size] == shape for size in sizes)
        assert shape.num_images < 2 * users


def test_programs_that_cost_nothing_are_not_shared():
    planned = plan(PHOTOS, program_pixels=0, multiple=BUCKET)
    assert {shape[1:] for shape in planned.values()} == {
        (bucket(height), bucket(width)) for height, width in PHOTOS
    }
    assert len(set(planned.values())) == 6


@pytest.mark.parametrize(("program_pixels", "number"), [(700_000, 3), (400_000_000, 1)])
def test_photos_share_programs(program_pixels, number):
    planned = plan(PHOTOS, program_pixels)
    assert len(set(planned.values())) == number
    assert cost(PHOTOS, planned, 0) < 1.2 * cost(PHOTOS, plan(PHOTOS, 0), 0) or number == 1


def test_a_batch_is_no_larger_than_its_images_need():
    assert plan([(8, 8)] * 5, max_images=8) == {(8, 8): PaddedShape(8, 8, 8)}
    assert plan([(8, 8)] * 2, max_images=8) == {(8, 8): PaddedShape(2, 8, 8)}
    assert plan([(800, 800)] * 9, max_images=8) == {(800, 800): PaddedShape(4, 800, 800)}


def test_thousands_of_sizes_are_planned_at_once():
    sizes = [(400 + i % 97, 300 + i % 89) for i in range(5000)]
    assert len(set(plan(sizes, program_pixels=1e6).values())) < 64
    assert plan([]) == {}
