"""Random numbers for training, computed from a counter: the same bits on CPU and GPU, and no state to save.

A usual generator is a machine with a state, and each number depends on all that were drawn before. Philox is a
function instead: it scrambles a counter under a key into four random words. minires puts into the counter what the
number is for (which element, which purpose, which training step) and into the key the seed. So dropout in step 1,000
draws the same mask in a fresh run, in a resumed run and on a GPU, whatever else was drawn before.

Weights are not drawn here but once, on the host, by NumPy's Generator.

Source      Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011: Philox4x32 with
            10 rounds, its constants and its known-answer vectors (which the tests check)
"""

import numbers

from minires.backend import array_module

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # the golden ratio - 1 and sqrt(3) - 1, times 2**32
WORD = 0xFFFFFFFF


def philox(counter, key, rounds=10):
    """Scramble a counter of four 32-bit words under a 64-bit key into four random 32-bit words.

    Why         A round multiplies two of the words by constants. The high half of a 64-bit product depends on every
                bit of the word, and is mixed with the key into its neighbour; the low half keeps the round
                invertible, so that different counters never meet. Seven rounds pass the tests of BigCrush; ten leave a
                margin.

    Shapes      counter: four uint64 arrays of one shape, values below 2**32  ->  four such arrays
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & WORD, key >> 32
    for _ in range(rounds):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & WORD, (p0 >> 32) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return c0, c1, c2, c3


def random_words(count, key, step, stream=0, *, xp, start=0):
    """Draw four random 32-bit words for each of `count` elements.

    Args        key: the seed, 64 bits; step: the training step, or the epoch, 64 bits, a number or a 0-d array;
                stream: keeps draws for different purposes under one key apart, 32 bits; xp: NumPy or CuPy; start: the
                index of the first element, so that a part of a whole can be drawn alone

    Shapes      ->  (count, 4), uint32
    """
    return words_of(xp.arange(start, start + count, dtype=xp.uint64), key, step, stream)


def words_of(elements, key, step, stream=0):
    """Draw four random 32-bit words for each of the elements, which are given by their indices, in any order.

    Shapes      elements (N,) uint64, below 2**32  ->  (N, 4), uint32
    Raises      ValueError for a key that is no integer of 64 bits
    """
    xp = array_module(elements)
    if not isinstance(key, numbers.Integral) or not 0 <= key < 2**64:
        raise ValueError(f"the key of random numbers, a seed, must be an integer from 0 to 2**64 - 1, got {key!r}")
    key = int(key)  # of NumPy's, the small ones cannot hold a word, and the others do not mix with uint64
    step = int(step) if isinstance(step, numbers.Integral) else step
    words = (xp.asarray(word, dtype=xp.uint64) for word in (stream, step & WORD, step >> 32))
    counter = (elements, *(xp.broadcast_to(word, elements.shape) for word in words))
    return xp.stack(philox(counter, key), axis=1).astype(xp.uint32)
