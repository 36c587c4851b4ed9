"""The batches of an epoch: every image once, the draws of its position, however the epoch is cut."""

import pickle
import threading

import numpy as np
import pytest

from minires import Batches
from minires.augment import random_crop
from minires.cifar10 import load_sample

DATA = load_sample()
ORDER = np.random.default_rng(0).permutation(1000)[:103]


def crop(images, index, start):
    return random_crop(images, 7, 1, start)


def of(batch_size, order=ORDER):
    return Batches(DATA.train_images, DATA.train_labels, order, batch_size, crop)


def together(batches):
    images, labels = zip(*batches, strict=True)
    return np.concatenate(images), np.concatenate(labels)


def test_an_epoch_gives_the_same_images_however_it_is_cut():
    expected = random_crop(DATA.train_images[ORDER], 7, 1)
    for batch_size in (1, 20, np.uint8(103), 500):
        images, labels = together(of(batch_size))
        np.testing.assert_array_equal(images, expected)
        np.testing.assert_array_equal(labels, DATA.train_labels[ORDER])


def test_two_batches_of_one_image_are_cropped_differently():
    """With the position of the first image left at 0, every batch of an epoch would get the same crops."""
    (first, _), (second, _) = of(50, np.zeros(100, int))
    assert (first != second).any()


def test_the_last_batch_has_what_is_left_over():
    assert [len(labels) for _, labels in of(20)] == [20, 20, 20, 20, 20, 3]
    assert [len(of(size)) for size in (1, 20, 103, 500)] == [103, 6, 1, 1]


def test_batches_that_are_skipped_change_nothing_in_those_that_follow():
    whole, rest = list(of(20)), list(of(20).skip(2).skip(1))
    assert len(of(20).skip(3)) == len(rest) == 3
    for (images, labels), (expected, expected_labels) in zip(rest, whole[3:], strict=True):
        np.testing.assert_array_equal(images, expected)
        np.testing.assert_array_equal(labels, expected_labels)
    assert list(of(20).skip(6)) == []


def test_the_next_batch_is_made_in_another_thread_while_one_is_in_use():
    made, threads = [], set()
    second = threading.Event()

    def transform(images, index, start):
        made.append(start)
        threads.add(threading.get_ident())
        if start == 20:
            second.set()
        return images

    batches = iter(Batches(DATA.train_images, DATA.train_labels, ORDER, 20, transform))
    next(batches)
    assert second.wait(timeout=10)
    assert made[0] == 0
    assert threading.get_ident() not in threads


def test_what_a_transform_raises_reaches_the_loop():
    def transform(images, index, start):
        raise ValueError("no such crop")

    with pytest.raises(ValueError, match="no such crop"):
        list(Batches(DATA.train_images, DATA.train_labels, ORDER, 20, transform))


def test_on_a_device_many_batches_are_augmented_at_once_to_the_same_images(strict_gpu):
    starts = []

    def transform(images, index, start):
        starts.append(start)
        return random_crop(images, 7, 1, start)

    arrays = (strict_gpu.asarray(array) for array in (DATA.train_images, DATA.train_labels, ORDER))
    batches = list(Batches(*arrays, 20, transform))
    assert starts == [0]
    for (images, labels), (expected, expected_labels) in zip(batches, of(20), strict=True):
        np.testing.assert_array_equal(strict_gpu.asnumpy(images), expected)
        np.testing.assert_array_equal(strict_gpu.asnumpy(labels), expected_labels)


def test_what_does_not_fit_together_is_named():
    with pytest.raises(ValueError, match="expected a label for each image, got 1000 images and 999 labels"):
        Batches(DATA.train_images, DATA.train_labels[:-1], ORDER, 20)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        Batches(DATA.train_images, DATA.train_labels, ORDER, 0)


def test_lists_and_sizes_that_are_no_integers_are_named():
    images, labels, order = np.zeros((4, 2, 2, 3)), np.arange(4), np.arange(4)
    for name, arguments in (
        ("images", (images.tolist(), labels, order)),
        ("labels", (images, labels.tolist(), order)),
        ("order", (images, labels, order.tolist())),
    ):
        with pytest.raises(TypeError, match=f"Batches: {name} expects an array, got a list"):
            Batches(*arguments, batch_size=2)
    for size in (2.0, None):
        with pytest.raises(TypeError, match=f"Batches: batch_size must be an integer, got {size}"):
            Batches(images, labels, order, size)


def test_no_batches_are_left_when_more_are_skipped_than_there_are():
    batches = Batches(np.zeros((4, 2)), np.arange(4), np.arange(4), 2).skip(9)
    assert (len(batches), list(batches)) == (0, [])


def test_batches_can_be_sent_to_another_process():
    batches = pickle.loads(pickle.dumps(Batches(np.arange(4), np.arange(4), np.arange(4), 2)))
    assert [labels.tolist() for _, labels in batches] == [[0, 1], [2, 3]]
