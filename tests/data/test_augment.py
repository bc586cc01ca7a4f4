"""Batches for several processes, and the augmentations against step-by-step oracles."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from quincunx.data import AUGMENTATIONS, ImageData, Split, augment, batches

GREY = (0.299, 0.587, 0.114)


def random_set(count, height=6, width=6, channels=3):
    rng = np.random.default_rng(count)
    images = torch.from_numpy(rng.integers(0, 256, (count, height, width, channels), dtype=np.uint8))
    split = Split(images, torch.arange(count))
    return split, ImageData(
        "random", split, split, ("a", "b"), (0.4,) * channels, (0.2,) * channels, augment="none"
    )


def epoch(split, data, size, kind="none", seed=None, **options):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return list(batches(split, data, size, generator=generator, augment=kind, **options))


# ---- several processes


@given(
    count=st.integers(1, 23),
    size=st.integers(1, 25),
    world=st.integers(1, 6),
    kind=st.sampled_from([kind for kind in AUGMENTATIONS if kind != "patches"]),
    seed=st.none() | st.integers(0, 99),
    channels_last=st.booleans(),
)
def test_what_all_processes_get_is_what_one_gets(count, size, world, kind, seed, channels_last):
    split, data = random_set(count)
    whole = epoch(split, data, size, kind, seed, channels_last=channels_last)
    shares = [
        epoch(split, data, size, kind, seed, channels_last=channels_last, rank=rank, world=world)
        for rank in range(world)
    ]
    assert [len(share) for share in shares] == [len(whole)] * world
    for step, (images, labels) in enumerate(whole):
        parts = [share[step] for share in shares]
        assert torch.equal(torch.cat([part for part, _ in parts]), images)
        assert torch.equal(torch.cat([part for _, part in parts]), labels)
        counts = [len(part) for _, part in parts]
        assert max(counts) - min(counts) <= 1
        for part, _ in parts:
            assert part.shape[1:] == images.shape[1:]
            layout = torch.channels_last if channels_last else torch.contiguous_format
            assert part.is_contiguous(memory_format=layout)


BAD = [
    ({"augment": True}, "augment=True"),
    ({"augment": "crop"}, "augment='crop': expected one of none, cifar, imagenet"),
    ({"batch_size": 0}, "batch_size=0"),
    ({"rank": 2, "world": 2}, "rank=2, world=2"),
    ({"rank": -1, "world": 2}, "rank=-1"),
    ({"world": 0}, "world=0"),
    ({"workers": -1}, "workers=-1"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_options_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        batches(*random_set(3), **{"batch_size": 2, **options})


# ---- random parts


@given(height=st.integers(1, 300), width=st.integers(1, 300), seed=st.integers(0, 2**62))
def test_parts_lie_inside_and_have_allowed_areas_and_ratios(height, width, seed):
    draws = augment.draws_of_batch(50, torch.Generator().manual_seed(seed))
    top, left, tall, wide = augment.boxes(draws, height, width).T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + tall <= height + 1e-9).all()
    assert (left + wide <= width + 1e-9).all()
    ratio, share = wide / tall, tall * wide / (height * width)
    assert (ratio >= 3 / 4 - 1e-9).all()
    assert (ratio <= 4 / 3 + 1e-9).all()
    assert (share <= 1 + 1e-9).all()
    # a long strip has no part of 8%, and gets its largest centre
    largest = min(width, height * 4 / 3) * min(height, width * 4 / 3) / (height * width)
    assert (share >= min(0.08, largest) - 1e-9).all()


def test_parts_of_a_long_strip_are_its_centre():
    draws = augment.draws_of_batch(20, torch.Generator().manual_seed(0))
    for height, width in ((3, 300), (300, 3)):
        for top, left, tall, wide in augment.boxes(draws, height, width):
            assert (top + tall / 2, left + wide / 2) == pytest.approx((height / 2, width / 2))
            assert tall * wide == pytest.approx(3 * 4)


def test_areas_fill_their_range_and_images_are_mirrored_half_of_the_time():
    draws = augment.draws_of_batch(4000, torch.Generator().manual_seed(0))
    _, _, tall, wide = augment.boxes(draws, 64, 64).T
    share = tall * wide / 64**2
    # below 3/4 every ratio fits into a square, so there areas are uniform
    below = np.sort(share[share < 0.75])
    steps = (below - 0.08) / 0.67
    distance = np.abs(steps - (np.arange(len(below)) + 0.5) / len(below)).max()
    assert distance < 1.95 / math.sqrt(len(below))  # Kolmogorov and Smirnov's bound at 0.001
    assert share.max() > 0.95
    assert abs(draws.mirror.mean() - 0.5) < 0.03


def bilinear(image, box, mirror):
    """A part of an image [H, W, C] at the image's size, pixel by pixel."""
    height, width, _ = image.shape
    top, left, tall, wide = box
    found = np.empty(image.shape)
    for y in range(height):
        for x in range(width):
            row = top + (y + 0.5) * tall / height - 0.5
            col = left + ((width - 1 - x if mirror else x) + 0.5) * wide / width - 0.5
            row, col = min(max(row, 0), height - 1), min(max(col, 0), width - 1)
            y0, x0 = int(row), int(col)
            y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
            a, b = row - y0, col - x0
            upper = (1 - b) * image[y0, x0] + b * image[y0, x1]
            lower = (1 - b) * image[y1, x0] + b * image[y1, x1]
            found[y, x] = (1 - a) * upper + a * lower
    return found


def changed(image, draws, order=(0, 1, 2)):
    """The changes of colour one after another on an image [H, W, 3] in [0, 1]."""

    def towards(other, amount):
        return amount * image + (1 - amount) * other

    strength = 0.6 + 0.8 * draws.strength[0]
    for kind in order:
        grey = (image * GREY).sum(-1, keepdims=True)
        image = towards((0, grey.mean(), grey)[kind], strength[kind])
    # PCA of ImageNet's colours, as published
    values = np.array([0.2175, 0.0188, 0.0045])
    vectors = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
    return image + (vectors * (0.1 * draws.light[0]) * values).sum(1)


def one_of(draws, index):
    return augment.Draws(
        *(getattr(draws, name)[index : index + 1] for name in augment.Draws.__dataclass_fields__)
    )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(9, 7), (8, 8), (1, 5)])
def test_whole_batches_are_cropped_and_coloured_as_each_image_alone(shape, channels):
    split, _ = random_set(6, *shape, channels)
    found = augment.photographs(split.images, 6, slice(0, 6), torch.Generator().manual_seed(3))
    draws = augment.draws_of_batch(6, torch.Generator().manual_seed(3))
    assert draws.mirror.any()
    assert not draws.mirror.all()
    for index, image in enumerate(split.images.numpy()):
        own = one_of(draws, index)
        wanted = bilinear(image / 255, augment.boxes(own, *shape)[0], own.mirror[0])
        for order in itertools.permutations(range(3)):
            coloured = changed(wanted, own, order).clip(0, 1) if channels == 3 else wanted
            assert np.abs(found[index].permute(1, 2, 0).numpy() - coloured).max() < 2e-5


def test_a_photograph_of_one_colour_changes_to_one_colour():
    for index in range(20):
        draws = augment.draws_of_image(5, index)
        colour = (200, 90, 40)
        found = augment.photograph(Image.new("RGB", (50, 70), colour), 16, draws)
        assert found.shape == (16, 16, 3)
        wanted = changed(np.full((1, 1, 3), np.array(colour) / 255), draws).clip(0, 1) * 255
        assert np.abs(found - wanted).max() <= 1


def test_a_photograph_shows_the_part_that_was_drawn(monkeypatch):
    monkeypatch.setattr(augment, "_JITTER", 0.0)
    monkeypatch.setattr(augment, "_LIGHTING", 0.0)
    height, width, side = 300, 400, 32
    # red says the column and green the row
    cols, rows = np.meshgrid(np.arange(width) / width, np.arange(height) / height)
    picture = Image.fromarray((255 * np.stack([cols, rows, cols * 0], -1)).round().astype(np.uint8))
    for index in range(20):
        draws = augment.draws_of_image(7, index)
        top, left, tall, wide = augment.boxes(draws, height, width)[0]
        found = augment.photograph(picture, side, draws)
        if draws.mirror[0]:
            found = found[:, ::-1]
        places = (np.arange(side) + 0.5) / side
        assert found[side // 2, 2:-2, 0] / 255 == pytest.approx(
            (left + wide * places)[2:-2] / width, abs=0.01
        )
        assert found[2:-2, side // 2, 1] / 255 == pytest.approx(
            (top + tall * places)[2:-2] / height, abs=0.01
        )


def test_what_is_drawn_for_an_image_depends_on_key_and_number_alone():
    first, again = augment.draws_of_image(3, 8), augment.draws_of_image(3, 8)
    for name in augment.Draws.__dataclass_fields__:
        assert np.array_equal(getattr(first, name), getattr(again, name))
    places = {tuple(augment.draws_of_image(key, i).place[0]) for key in range(5) for i in range(5)}
    assert len(places) == 25


def test_imagenet_batches_are_normalised():
    split, _ = random_set(4)
    data = ImageData("x", split, split, ("a",), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), augment="imagenet")
    ((found, _),) = epoch(split, data, 4, "imagenet", 1)
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(4, generator=generator)
    plain = augment.photographs(split.images[order], 4, slice(0, 4), generator)
    for channel in range(3):
        wanted = (plain[:, channel] - data.mean[channel]) / data.std[channel]
        assert torch.allclose(found[:, channel], wanted, atol=1e-6)


def test_imagenet_augmentation_changes_with_the_generator_only():
    split, data = random_set(8)
    first = torch.cat([x for x, _ in epoch(split, data, 3, "imagenet", 1)])
    assert torch.equal(first, torch.cat([x for x, _ in epoch(split, data, 3, "imagenet", 1)]))
    assert not torch.equal(first, torch.cat([x for x, _ in epoch(split, data, 3, "imagenet", 2)]))
    plain = torch.cat([x for x, _ in epoch(split, data, 3, "imagenet")])
    assert torch.equal(plain, torch.cat([x for x, _ in epoch(split, data, 3)]))
