"""Augmentation: each image is moved and mirrored as a whole, by draws that can be repeated."""

import functools

import numpy as np
import pytest

from minires.augment import (
    MEAN_COLOR,
    OPERATIONS,
    STRENGTHS,
    alternating_flip,
    change,
    cutout,
    normalize,
    random_crop,
    random_flip,
    trivial_augment,
)
from minires.cifar10 import MEAN, STD, load_sample

RANDOM = [random_crop, random_flip, cutout, trivial_augment]


@pytest.fixture
def images(rng):
    return rng.integers(1, 256, (2000, 6, 5, 3), dtype=np.uint8)


def test_a_crop_is_one_of_the_windows_of_the_padded_image(images):
    out = random_crop(images, key=1, epoch=2, padding=2)
    assert out.shape == images.shape
    assert out.dtype == np.uint8
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    places = []
    for image, source in zip(out, padded, strict=True):
        matches = [(y, x) for y in range(5) for x in range(5) if (source[y : y + 6, x : x + 5] == image).all()]
        assert len(matches) == 1
        places.append(matches[0])
    counts = np.bincount([5 * y + x for y, x in places], minlength=25)
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
    order = np.random.default_rng(1).permutation(2000)  # the place in the epoch plays no part, the image does
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


def one_change(image, operation, strength, negative=0):
    settings = ([value] for value in (OPERATIONS.index(operation), strength, negative))
    return change(image[None], *map(np.array, settings))[0]


def grid(rows):
    """A grey image of these values."""
    return np.repeat(np.array(rows, np.uint8)[:, :, None], 3, axis=2)


# At strength 30 mixtures have a share of 1.99 or 0.01, at 15 of 1.495 or 0.505; a shear moves row y + 1/2 by 0.99 of
# that.
SMALL = grid([[10, 20, 30, 40], [50, 60, 70, 80], [90, 100, 110, 120], [130, 140, 150, 160]])
BY_HAND = [
    ("identity", 30, 0, SMALL),
    ("shear x", 30, 0, grid([[10, 20, 30, 40], [60, 70, 80, 0], [110, 120, 0, 0], [160, 0, 0, 0]])),
    ("shear y", 30, 1, grid([[10, 0, 0, 0], [50, 20, 0, 0], [90, 60, 30, 0], [130, 100, 70, 40]])),
    ("translate x", 1, 0, grid([[20, 30, 40, 0], [60, 70, 80, 0], [100, 110, 120, 0], [140, 150, 160, 0]])),
    ("translate y", 2, 1, grid([[0] * 4, [0] * 4, [10, 20, 30, 40], [50, 60, 70, 80]])),
    ("rotate", 20, 0, grid([[40, 80, 120, 160], [30, 70, 110, 150], [20, 60, 100, 140], [10, 50, 90, 130]])),
    ("brightness", 30, 0, grid([[19, 39, 59, 79], [99, 119, 139, 159], [179, 199, 218, 238], [255] * 4])),
    ("brightness", 15, 1, grid([[5, 10, 15, 20], [25, 30, 35, 40], [45, 50, 55, 60], [65, 70, 75, 80]])),
    ("color", 30, 0, SMALL),
    ("contrast", 30, 1, grid([[84] * 4, [84, 84, 84, 84], [85] * 4, [85] * 4])),  # 85 is the mean
    ("posterize", 30, 0, grid([[0] * 4, [0, 0, 64, 64], [64] * 4, [128] * 4])),
    ("solarize", 15, 0, grid([[10, 20, 30, 40], [50, 60, 70, 80], [90, 100, 110, 120], [125, 115, 105, 95]])),
    ("autocontrast", 0, 0, grid([[0, 17, 34, 51], [68, 85, 102, 119], [136, 153, 170, 187], [204, 221, 238, 255]])),
    ("equalize", 0, 0, SMALL),  # 15 pixels below the brightest are fewer than 255: no table to be had
]


@pytest.mark.parametrize(("operation", "strength", "negative", "expected"), BY_HAND)
def test_operations_by_hand(operation, strength, negative, expected):
    np.testing.assert_array_equal(one_change(SMALL, operation, strength, negative), expected)


def test_color_mixes_with_grey():
    image = np.array([[[200, 100, 50]]], np.uint8)  # grey of 59.8 + 58.7 + 5.7 = 124
    np.testing.assert_array_equal(one_change(image, "color", 30, 1)[0, 0], [124, 123, 123])
    np.testing.assert_array_equal(one_change(image, "color", 30, 0)[0, 0], [255, 76, 0])


def test_sharpness_mixes_with_a_smoothed_image():
    image = grid([[0, 0, 0, 0], [0, 130, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    smooth = grid([[0, 0, 0, 0], [0, 50, 10, 0], [0, 10, 10, 0], [0, 0, 0, 0]])  # 5/13 and 1/13 of 130
    assert abs(one_change(image, "sharpness", 30, 1).astype(int) - smooth).max() <= 1
    np.testing.assert_array_equal(one_change(image, "sharpness", 30, 0)[1, 1], 50 + int(1.99 * 80))


def test_equalize_spreads_the_values_evenly():
    image = np.repeat(np.arange(64, dtype=np.uint8), 16).reshape(32, 32, 1).repeat(3, axis=2)
    # 16 pixels of each of 64 values; (1024 - 16) // 255 = 3 pixels to a value
    expected = np.minimum((1 + 16 * np.arange(64)) // 3, 255)
    np.testing.assert_array_equal(one_change(image, "equalize", 0)[:, ::16, 0].reshape(-1), expected)


def test_flat_images_stay_as_they_are():
    for operation in ("autocontrast", "equalize", "sharpness"):
        flat = np.full((32, 32, 3), 9, np.uint8)
        np.testing.assert_array_equal(one_change(flat, operation, 30), flat)


def with_pillow(image, operation, strength, sign):
    from PIL import Image, ImageEnhance, ImageOps

    part = strength / 30
    share = 1 + sign * 0.99 * part
    image = Image.fromarray(image)
    return np.asarray(
        {
            "identity": lambda: image,
            "shear x": lambda: image.transform((32, 32), Image.AFFINE, (1, sign * 0.99 * part, 0, 0, 1, 0)),
            "shear y": lambda: image.transform((32, 32), Image.AFFINE, (1, 0, 0, sign * 0.99 * part, 1, 0)),
            "translate x": lambda: image.transform((32, 32), Image.AFFINE, (1, 0, sign * 32 * part, 0, 1, 0)),
            "translate y": lambda: image.transform((32, 32), Image.AFFINE, (1, 0, 0, 0, 1, sign * 32 * part)),
            "rotate": lambda: image.rotate(sign * 135 * part),
            "brightness": lambda: ImageEnhance.Brightness(image).enhance(share),
            "color": lambda: ImageEnhance.Color(image).enhance(share),
            "contrast": lambda: ImageEnhance.Contrast(image).enhance(share),
            "sharpness": lambda: ImageEnhance.Sharpness(image).enhance(share),
            "posterize": lambda: ImageOps.posterize(image, 8 - round(6 * part)),
            "solarize": lambda: ImageOps.solarize(image, 255 * (1 - part)),
            "autocontrast": lambda: ImageOps.autocontrast(image),
            "equalize": lambda: ImageOps.equalize(image),
        }[operation]()
    )


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_are_those_of_pillow(operation):
    """To the last bit, but for products and quotients that Pillow rounds in floating point: those within 1."""
    pytest.importorskip("PIL")
    images = load_sample().test_images[:20]
    for strength in (0, 1, 7, 15, 22, 30):
        for negative in (0, 1):
            settings = (np.full(20, value) for value in (OPERATIONS.index(operation), strength, negative))
            ours = change(images, *settings)
            theirs = np.stack([with_pillow(image, operation, strength, 1 - 2 * negative) for image in images])
            difference = abs(ours.astype(int) - theirs)
            assert difference.max() <= 1
            assert (difference > 0).mean() < 0.01
            if operation not in ("brightness", "color", "contrast", "autocontrast"):
                assert difference.max() == 0


def test_trivial_augment_draws_every_operation_strength_and_direction_alike(monkeypatch, images):
    import minires.augment

    drawn = {}

    def record(images, operation, strength, negative):
        drawn.update(operation=operation, strength=strength, negative=negative)
        return images

    monkeypatch.setattr(minires.augment, "change", record)
    trivial_augment(np.zeros((31_000, 1, 1, 3), np.uint8), 1, 2)
    for name, values in (("operation", len(OPERATIONS)), ("strength", STRENGTHS), ("negative", 2)):
        counts = np.bincount(drawn[name], minlength=values)
        assert len(counts) == values
        expected = 31_000 / values
        assert abs(counts - expected).max() < 4.5 * expected**0.5
    assert abs(np.corrcoef(list(drawn.values())) - np.eye(3)).max() < 0.03


def test_images_of_a_batch_do_not_disturb_each_other():
    images = load_sample().test_images[:100]
    together = trivial_augment(images, 3, 4)
    for i in range(100):
        np.testing.assert_array_equal(trivial_augment(images[i : i + 1], 3, 4, i)[0], together[i])


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


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        (lambda x: random_crop(x, 1, 1, padding=-1), "padding must be a whole number of at least 0, got -1"),
        (lambda x: random_flip(x, 1, 1, p=2), "p must be from 0 to 1, got 2"),
        (lambda x: cutout(x, 1, 1, size=1.5), "size must be a whole number of at least 0, got 1.5"),
        (lambda x: cutout(x[:, :, :, :1], 1, 1), "color has 3 numbers, and the images .* have other channels"),
        (lambda x: trivial_augment(x / 255, 1, 1), "trivial_augment expects images .* of uint8, got .* of float64"),
        (
            lambda x: trivial_augment(x[:, :, :, :1], 1, 1),
            r"images \(N, H, W, 3\) of uint8, got .* 1\) of uint8",
        ),
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
