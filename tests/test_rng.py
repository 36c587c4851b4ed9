"""Philox gives the published numbers, and what is drawn depends on key, step, stream and element alone."""

import numpy as np
import pytest

from minires.rng import philox, random_words, words_of


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known-answer vectors of Random123, philox4x32 with 10 rounds
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers(counter, key, expected):
    counter = [np.array([int(word, 16)], np.uint64) for word in counter.split()]
    k0, k1 = (int(word, 16) for word in key.split())
    assert " ".join(f"{int(word[0]):08x}" for word in philox(counter, k0 | k1 << 32)) == expected


def test_words_are_those_of_the_counter_element_stream_step():
    words = random_words(3, key=2**40 + 5, step=2**33 + 7, stream=9, xp=np)
    assert words.shape == (3, 4)
    assert words.dtype == np.uint32
    counter = [np.array([word], np.uint64) for word in (2, 9, 7, 2)]
    np.testing.assert_array_equal(words[2], np.concatenate(philox(counter, 2**40 + 5)))


def test_more_elements_do_not_change_the_first_ones():
    np.testing.assert_array_equal(random_words(5, 1, 2, xp=np), random_words(50, 1, 2, xp=np)[:5])


def test_a_part_of_a_whole_and_single_elements_can_be_drawn_alone():
    whole = random_words(50, 1, 2, 3, xp=np)
    np.testing.assert_array_equal(random_words(9, 1, 2, 3, xp=np, start=20), whole[20:29])
    elements = np.array([7, 0, 49, 7], np.uint64)
    np.testing.assert_array_equal(words_of(elements, 1, 2, 3), whole[[7, 0, 49, 7]])


def test_another_key_step_or_stream_gives_other_words():
    words = [random_words(100, 1, 2, xp=np), *(random_words(100, *args, xp=np) for args in [(2, 2), (1, 3), (1, 2, 1)])]
    for i in range(4):
        for j in range(i):
            assert not (words[i] == words[j]).any()


def test_words_are_uniform():
    unit = random_words(100_000, 3, 4, xp=np) / 2**32
    assert abs(unit.mean() - 0.5) < 0.002  # 4 standard deviations of a mean of 400,000
    counts = np.histogram(unit, bins=64, range=(0, 1))[0]
    chi_squared = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert 30 < chi_squared < 110  # 63 expected


def test_the_same_bits_on_a_device(strict_gpu):
    device = random_words(10, 5, 6, 7, xp=strict_gpu)
    np.testing.assert_array_equal(strict_gpu.asnumpy(device), random_words(10, 5, 6, 7, xp=np))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int32, np.int64, np.uint64])
def test_a_key_and_a_step_in_numpys_integers_draw_the_same(dtype):
    np.testing.assert_array_equal(random_words(9, dtype(5), dtype(6), xp=np), random_words(9, 5, 6, xp=np))


@pytest.mark.parametrize("key", [-1, 2**64, 1.0, None])
def test_a_seed_that_is_none_is_named(key):
    with pytest.raises(ValueError, match=rf"a seed, must be an integer from 0 to 2\*\*64 - 1, got {key}"):
        random_words(3, key, 0, xp=np)
