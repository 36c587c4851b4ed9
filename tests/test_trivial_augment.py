"""TrivialAugment: its operations by hand and beside Pillow's, and what it draws."""

import numpy as np
import pytest

from minires.cifar10 import load_sample
from minires.trivial_augment import OPERATIONS, STRENGTHS, change, trivial_augment


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


def test_trivial_augment_draws_every_operation_strength_and_direction_alike(monkeypatch):
    from minires import trivial_augment as module

    drawn = {}

    def record(images, operation, strength, negative):
        drawn.update(operation=operation, strength=strength, negative=negative)
        return images

    monkeypatch.setattr(module, "change", record)
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


def test_only_bytes_in_three_channels_are_changed():
    with pytest.raises(ValueError, match=r"trivial_augment expects images .* of uint8, got .* of float64"):
        trivial_augment(np.zeros((2, 6, 5, 3)), 1, 1)
    with pytest.raises(ValueError, match=r"images \(N, H, W, 3\) of uint8, got .* 1\) of uint8"):
        trivial_augment(np.zeros((2, 6, 5, 1), np.uint8), 1, 1)


def test_images_without_pixels_stay_as_they_are():
    assert trivial_augment(np.zeros((3, 0, 5, 3), np.uint8), 1, 1).shape == (3, 0, 5, 3)
