"""Augmentation: each image is moved and mirrored as a whole, by draws that can be repeated."""

import functools

import numpy as np
import pytest

from minires.augment import (
    MEAN_COLOR,
    alternating_flip,
    cutout,
    normalize,
    random_crop,
    random_flip,
    resize,
    triangle_weights,
)
from minires.cifar10 import MEAN, STD
from minires.trivial_augment import trivial_augment

RANDOM = [random_crop, random_flip, cutout, trivial_augment]


@pytest.fixture
def images(rng):
    return rng.integers(1, 256, (2000, 6, 5, 3), dtype=np.uint8)


def test_a_crop_is_one_of_the_windows_of_the_padded_image(images):
    out = random_crop(images, key=1, epoch=2, padding=2)
    assert out.shape == images.shape
    assert out.dtype == np.uint8
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    corners = []
    for image, source in zip(out, padded, strict=True):
        matches = [(y, x) for y in range(5) for x in range(5) if (source[y : y + 6, x : x + 5] == image).all()]
        assert len(matches) == 1
        corners.append(matches[0])
    counts = np.bincount([5 * y + x for y, x in corners], minlength=25)
    assert counts.min() > 40  # 80 expected of each of the 25 windows, deviation 9
    assert counts.max() < 120


def test_a_flip_mirrors_half_of_the_images(images):
    out = random_flip(images, key=1, epoch=2)
    mirrored = (out == images[:, :, ::-1]).all(axis=(1, 2, 3))
    unchanged = (out == images).all(axis=(1, 2, 3))
    assert (mirrored ^ unchanged).all()
    assert abs(mirrored.mean() - 0.5) < 0.05


def test_flip_with_p_0_and_nearly_1(images):
    np.testing.assert_array_equal(random_flip(images, 1, 2, p=0.0), images)
    np.testing.assert_array_equal(random_flip(images, 1, 2, p=1 - 2**-32), images[:, :, ::-1])
    np.testing.assert_array_equal(random_flip(images, 1, 2, p=1.0), images[:, :, ::-1])


@pytest.mark.parametrize("augment", RANDOM)
def test_key_and_epoch_fix_the_result(images, augment):
    before = images.copy()
    out = augment(images, 1, 2)
    assert out.dtype == np.uint8
    assert out.shape == images.shape
    np.testing.assert_array_equal(images, before)
    np.testing.assert_array_equal(out, augment(images, 1, 2))
    assert (out != augment(images, 1, 3)).any()
    assert (out != augment(images, 2, 2)).any()


@pytest.mark.parametrize("augment", RANDOM)
def test_the_result_does_not_depend_on_how_an_epoch_is_cut(images, augment):
    parts = [augment(images[start : start + 700], 1, 2, start) for start in range(0, 2000, 700)]
    np.testing.assert_array_equal(np.concatenate(parts), augment(images, 1, 2))


def test_an_alternating_flip_mirrors_every_image_in_every_other_epoch(images):
    index = np.random.default_rng(0).permutation(50_000)[:2000]
    epochs = [alternating_flip(images, index, 1, epoch) for epoch in (1, 2, 3)]
    mirrored = (epochs[0] == images[:, :, ::-1]).all(axis=(1, 2, 3))
    assert abs(mirrored.mean() - 0.5) < 0.05
    np.testing.assert_array_equal(epochs[0][~mirrored], images[~mirrored])
    np.testing.assert_array_equal(epochs[1], epochs[0][:, :, ::-1])
    np.testing.assert_array_equal(epochs[2], epochs[0])
    order = np.random.default_rng(1).permutation(2000)  # the position in the epoch plays no part, the image does
    np.testing.assert_array_equal(alternating_flip(images[order], index[order], 1, 1), epochs[0][order])
    assert (alternating_flip(images, index, 2, 1) != epochs[0]).any()


def test_a_cutout_covers_one_square_that_may_stick_out():
    images = np.full((5000, 6, 5, 3), 7, np.uint8)
    out = cutout(images, key=1, epoch=2, size=3)
    covered = (out == MEAN_COLOR).all(axis=3)
    np.testing.assert_array_equal(out[~covered], 7)
    squares = {}
    for top in range(-1, 5):
        for left in range(-1, 4):
            square = np.zeros((6, 5), bool)
            square[max(top, 0) : top + 3, max(left, 0) : left + 3] = True
            squares[square.tobytes()] = 0
    assert len(squares) == 30
    for square in covered:
        squares[square.tobytes()] += 1
    assert min(squares.values()) > 110  # 167 expected of each, deviation 13
    assert max(squares.values()) < 225


def test_crop_and_flip_draw_independently(images):
    middle = images[:, :, 2:3].repeat(5, axis=2)  # columns all alike: a flip changes nothing, a move up or down does
    flipped = (random_flip(images, 1, 2) != images).any(axis=(1, 2, 3))
    moved_up = (random_crop(middle, 1, 2, padding=1)[:, 0] == 0).all(axis=(1, 2))
    assert abs(np.corrcoef(flipped, moved_up)[0, 1]) < 0.1


@pytest.mark.parametrize("augment", [random_crop, random_flip, cutout, trivial_augment])
def test_no_images_stay_no_images(images, augment):
    assert augment(images[:0], 1, 1).shape == images[:0].shape


@pytest.mark.parametrize("augment", [random_crop, random_flip, functools.partial(cutout, color=(125 / 255,) * 3)])
def test_images_of_floats_are_treated_as_those_of_bytes(images, augment):
    out = augment((images / 255).astype(np.float32), 1, 1)
    assert out.dtype == np.float32
    if augment in (random_crop, random_flip):
        np.testing.assert_array_equal(out, (augment(images, 1, 1) / 255).astype(np.float32))


@pytest.mark.parametrize("size", [1, 7, 24, 32, 33, 48])
def test_another_size_is_that_of_pillow_to_the_last_rounding(rng, size):
    images = rng.integers(0, 256, (50, 32, 32, 3), dtype=np.uint8)
    Image = pytest.importorskip("PIL.Image")
    expected = [np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)) for image in images]
    out = resize(images, size)
    assert out.shape == (len(images), size, size, 3)
    assert out.dtype == np.uint8
    assert np.abs(out.astype(int) - np.stack(expected)).max() <= 1


def test_the_same_size_changes_nothing_and_one_color_stays_it(images):
    np.testing.assert_array_equal(resize(images[:, :5], 5), images[:, :5])
    for value in (0, 77, 255):
        assert (resize(np.full((2, 32, 32, 3), value, np.uint8), 24) == value).all()
        assert (resize(np.full((1, 5, 9, 2), value, np.uint8), 3) == value).all()


@pytest.mark.parametrize(("side", "size"), [(32, 24), (32, 32), (32, 1), (5, 9), (1, 4), (224, 32)])
def test_the_weights_of_another_size_are_integers_that_add_up(side, size):
    weights = triangle_weights(side, size)
    assert weights.shape == (size, side)
    assert (weights >= 0).all()
    np.testing.assert_array_equal(weights, np.rint(weights))
    np.testing.assert_array_equal(weights.sum(axis=1), 256)


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        (lambda x: resize(x, 0), "resize: size must be an integer of at least 1, got 0"),
        (lambda x: resize(x, 24.0), "resize: size must be an integer of at least 1, got 24.0"),
        (lambda x: resize(x[0], 24), r"resize expects images \(N, H, W, C\)"),
        (lambda x: resize(x / 255, 24), "resize expects images of uint8, values 0 to 255, got float64"),
        (lambda x: random_crop(x, 1, 1, padding=-1), "padding must be an integer of at least 0, got -1"),
        (lambda x: random_flip(x, 1, 1, p=2), "p must be from 0 to 1, got 2"),
        (lambda x: cutout(x, 1, 1, size=1.5), "size must be an integer of at least 0, got 1.5"),
        (lambda x: cutout(x[:, :, :, :1], 1, 1), "color has 3 numbers, and the images .* have other channels"),
    ],
)
def test_what_cannot_be_augmented_is_named(images, augment, message):
    with pytest.raises(ValueError, match=message):
        augment(images)


def test_normalize_by_hand():
    images = np.array([0, 127, 255], np.uint8).reshape(1, 1, 1, 3)
    out = normalize(images, MEAN, STD)
    assert out.dtype == np.float32
    expected = [(value / 255 - m) / s for value, m, s in zip((0, 127, 255), MEAN, STD, strict=True)]
    np.testing.assert_allclose(out[0, 0, 0], expected, rtol=1e-5)
    half = normalize(images, MEAN, STD, dtype="float16")
    assert half.dtype == np.float16
    np.testing.assert_array_equal(half, out.astype(np.float16))


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "bool"])
def test_normalize_takes_bytes_alone(images, dtype):
    with pytest.raises(ValueError, match=f"^normalize expects images of uint8, values 0 to 255, got {dtype}$"):
        normalize((images / 255).astype(dtype), MEAN, STD)


def test_the_color_of_a_cutout_is_the_mean():
    assert tuple(round(255 * mean) for mean in MEAN) == MEAN_COLOR


def augmented(images, index):
    images = random_flip(random_crop(images, 5, 6), 5, 6)
    images = alternating_flip(images, index, 5, 6)
    return normalize(cutout(trivial_augment(images, 5, 6, start=40), 5, 6, start=40), MEAN, STD)


def test_the_same_bits_on_a_device(images, strict_gpu):
    index = np.arange(500) * 3
    host, device = (
        augmented(images[:500], index),
        augmented(strict_gpu.asarray(images[:500]), strict_gpu.asarray(index)),
    )
    np.testing.assert_array_equal(strict_gpu.asnumpy(device), host)


@pytest.mark.parametrize(
    "augment",
    [
        lambda x: random_crop(x, 1, 1),
        lambda x: random_flip(x, 1, 1),
        lambda x: alternating_flip(x, np.arange(len(x)), 1, 1),
        lambda x: cutout(x, 1, 1),
        lambda x: normalize(x, MEAN, STD),
        lambda x: trivial_augment(x, 1, 1),
    ],
)
def test_a_single_image_is_not_taken_for_many(images, augment):
    with pytest.raises(ValueError, match=r"expects images \(N, H, W, C\), got \(\d+, \d+, 3\)"):
        augment(images[0])
    with pytest.raises(ValueError, match=r"expects images \(N, H, W, C\), got a list"):
        augment([images[0]])


@pytest.mark.parametrize(("mean", "std"), [(MEAN, (1, 0, 1)), (MEAN[:1], STD[:1]), (MEAN, STD[:2])])
def test_a_mean_or_deviation_that_does_not_fit_is_named(images, mean, std):
    with pytest.raises(ValueError, match=r"normalize expects a mean and a deviation above 0 for each channel of \("):
        normalize(images, mean, std)
    with pytest.raises(ValueError, match="for each channel of"):  # one channel would become three
        normalize(images[..., :1], MEAN, STD)


def test_settings_in_numpys_integers_are_those_in_pythons(images):
    np.testing.assert_array_equal(
        random_crop(images[:9], 1, 1, 0, np.uint8(200)), random_crop(images[:9], 1, 1, 0, 200)
    )
    np.testing.assert_array_equal(cutout(images, 1, 1, size=np.int8(8)), cutout(images, 1, 1, size=8))
    np.testing.assert_array_equal(
        alternating_flip(images, list(range(len(images))), 1, 1), alternating_flip(images, np.arange(len(images)), 1, 1)
    )
