"""Augmentation: each image is moved and mirrored as a whole, by draws that can be repeated."""

import numpy as np
import pytest

from minires.augment import normalize, random_crop, random_flip
from minires.cifar10 import MEAN, STD


@pytest.fixture
def images(rng):
    return rng.integers(1, 256, (2000, 6, 5, 3), dtype=np.uint8)


def test_a_crop_is_one_of_the_windows_of_the_padded_image(images):
    out = random_crop(images, key=1, step=2, padding=2)
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
    out = random_flip(images, key=1, step=2)
    mirrored = (out == images[:, :, ::-1]).all(axis=(1, 2, 3))
    unchanged = (out == images).all(axis=(1, 2, 3))
    assert (mirrored ^ unchanged).all()
    assert abs(mirrored.mean() - 0.5) < 0.05


def test_flip_with_p_0_and_nearly_1(images):
    np.testing.assert_array_equal(random_flip(images, 1, 2, p=0.0), images)
    np.testing.assert_array_equal(random_flip(images, 1, 2, p=1 - 2**-32), images[:, :, ::-1])
    np.testing.assert_array_equal(random_flip(images, 1, 2, p=1.0), images[:, :, ::-1])


@pytest.mark.parametrize("augment", [random_crop, random_flip])
def test_key_and_step_fix_the_result(images, augment):
    before = images.copy()
    out = augment(images, 1, 2)
    np.testing.assert_array_equal(images, before)
    np.testing.assert_array_equal(out, augment(images, 1, 2))
    assert (out != augment(images, 1, 3)).any()
    assert (out != augment(images, 2, 2)).any()


def test_crop_and_flip_draw_independently(images):
    middle = images[:, :, 2:3].repeat(5, axis=2)  # columns all alike: a flip changes nothing, a move up or down does
    flipped = (random_flip(images, 1, 2) != images).any(axis=(1, 2, 3))
    moved_up = (random_crop(middle, 1, 2, padding=1)[:, 0] == 0).all(axis=(1, 2))
    assert abs(np.corrcoef(flipped, moved_up)[0, 1]) < 0.1


def test_normalize_by_hand():
    images = np.array([0, 127, 255], np.uint8).reshape(1, 1, 1, 3)
    out = normalize(images, MEAN, STD)
    assert out.dtype == np.float32
    expected = [(value / 255 - m) / s for value, m, s in zip((0, 127, 255), MEAN, STD, strict=True)]
    np.testing.assert_allclose(out[0, 0, 0], expected, rtol=1e-5)


def test_the_same_bits_on_a_device(images, strict_gpu):
    on_device = strict_gpu.asarray(images)
    host = normalize(random_flip(random_crop(images, 5, 6), 5, 6), MEAN, STD)
    device = normalize(random_flip(random_crop(on_device, 5, 6), 5, 6), MEAN, STD)
    np.testing.assert_array_equal(strict_gpu.asnumpy(device), host)
