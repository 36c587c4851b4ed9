"""What is done to images before the network sees them: crop, flip, cutout, another size, and normalisation.

A network that sees each image moved, mirrored or partly covered, differently in every epoch, overfits later: it cannot
memorise the images, and learns that none of this changes what is on them. Augmentation is for training alone.

Pure functions on many images at once, on CPU and GPU. The random ones draw for an image by the seed of the run, the
epoch, and the position of the image in the epoch's order (`alternating_flip` by its index in the data set, once for all
epochs). So the result is the same however an epoch is cut into batches, and the draws of the functions are independent
of each other. All is computed in integers until `normalize`, and gives the same bits everywhere.

    key         the seed of the run
    epoch       the number of the epoch
    start       the position of the first of the images in the epoch's order: leave it at 0, and every batch of an epoch
                is moved and mirrored alike

Source      He et al. 2016, section 4.2, for crop and flip; the others are named where they stand
"""

import numbers

import numpy as np

from minires.backend import array_module
from minires.rng import random_words, words_of

CROP_STREAM, FLIP_STREAM, CUTOUT_STREAM, ALTERNATING_STREAM = 1, 2, 3, 4
MEAN_COLOR = (125, 123, 114)  # round(255 m) of cifar10.MEAN: what normalize makes (almost) 0


def random_crop(images, key, epoch, start=0, padding=4):
    """Move each image by up to `padding` pixels each way, and fill the border with black.

    It is the crop of an H x W window from the image with a border of `padding` black pixels; all (2 padding + 1)^2
    windows are equally likely.

    Shapes      images (N, H, W, C)  ->  the same
    Raises      ValueError for a padding that is no integer of at least 0
    """
    if not isinstance(padding, numbers.Integral) or padding < 0:
        raise ValueError(f"random_crop: padding must be an integer of at least 0, got {padding!r}")
    check_images("random_crop", images)
    xp, padding = array_module(images), int(padding)  # in uint8, 2 padding + 1 could wrap round
    N, H, W, _ = images.shape
    corner = draw_below(2 * padding + 1, random_words(N, key, epoch, CROP_STREAM, xp=xp, start=start)[:, :2])  # (N, 2)
    rows = corner[:, 0, None] + xp.arange(H)  # (N, H)
    cols = corner[:, 1, None] + xp.arange(W)  # (N, W)
    padded = xp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    return padded[xp.arange(N)[:, None, None], rows[:, :, None], cols[:, None, :]]


def random_flip(images, key, epoch, start=0, p=0.5):
    """Mirror each image, left for right, with probability p.

    Shapes      images (N, H, W, C)  ->  the same
    Raises      ValueError for a p outside 0 to 1
    """
    if not 0 <= p <= 1:
        raise ValueError(f"random_flip: p must be from 0 to 1, got {p}")
    check_images("random_flip", images)
    xp = array_module(images)
    words = random_words(len(images), key, epoch, FLIP_STREAM, xp=xp, start=start)[:, 0].astype(xp.uint64)
    return mirror(images, words < int(p * 2**32))


def alternating_flip(images, index, key, epoch):
    """Mirror each image in every other epoch; chance decides whether in the even or in the odd ones.

    Why         With random flips, two epochs in a row show half of the images in the same way. Here they show every
                image in both, and the network learns sooner.

    Shapes      images (N, H, W, C), index (N,) of each image in the data set  ->  the images
    Source      Jordan 2024, "94% on CIFAR-10 in 3.29 seconds on a single GPU"
    """
    check_images("alternating_flip", images)
    xp = array_module(images)
    words = words_of(xp.asarray(index).astype(xp.uint64), key, 0, ALTERNATING_STREAM)[:, 0]
    return mirror(images, (words & 1) == epoch % 2)


def mirror(images, chosen):
    """Mirror the chosen images, left for right.

    Shapes      images (N, H, W, C), chosen (N,) bool  ->  the images
    """
    return array_module(images).where(chosen[:, None, None, None], images[:, :, ::-1], images)


def cutout(images, key, epoch, start=0, size=8, color=MEAN_COLOR):
    """Cover a square of each image with one color, so that the network does not rely on any single part.

    The middle of the square may be any pixel; what lies outside the image is cut off.

    Args        size: pixels, at least 0; color: a number for each channel, in the units of the images
    Shapes      images (N, H, W, C)  ->  the same
    Raises      ValueError for another size, and for a color that has not C numbers
    Source      DeVries and Taylor 2017, "Improved regularization of convolutional neural networks with cutout"
    """
    if not isinstance(size, numbers.Integral) or size < 0:
        raise ValueError(f"cutout: size must be an integer of at least 0, got {size!r}")
    check_images("cutout", images)
    if len(color) != images.shape[3]:
        raise ValueError(f"cutout: color has {len(color)} numbers, and the images {images.shape} have other channels")
    xp = array_module(images)
    N, H, W, _ = images.shape
    words = random_words(N, key, epoch, CUTOUT_STREAM, xp=xp, start=start)
    top, left = draw_below(H, words[:, 0]) - size // 2, draw_below(W, words[:, 1]) - size // 2  # (N,)
    rows, cols = xp.arange(H) - top[:, None], xp.arange(W) - left[:, None]  # (N, H), (N, W): counted from the square
    covered = ((rows >= 0) & (rows < size))[:, :, None] & ((cols >= 0) & (cols < size))[:, None, :]  # (N, H, W)
    return xp.where(covered[:, :, :, None], xp.asarray(color, dtype=images.dtype), images)


def resize(images, size):
    """Bring images to size x size pixels, each of which is a weighted mean of the old ones around it.

    Why         A network of convolutions and one mean over all pixels takes images of any size, and small ones in less
                time. A pixel looks at old ones up to max(1, side / size) pixels away, the nearer the more (a triangle):
                so no line falls between the new pixels (antialiasing).
                The weights are integers that add up to 256, first for rows, then for columns, and the sums stay below
                256 * 256 * 256 = 2^24, where float32 still has every integer. So the result is the same bits
                everywhere, whatever the order in which a product adds.

    Shapes      images (N, H, W, C) uint8  ->  (N, size, size, C) uint8
    Raises      ValueError for a size that is no integer of at least 1
    """
    if not isinstance(size, numbers.Integral) or size < 1:
        raise ValueError(f"resize: size must be an integer of at least 1, got {size!r}")
    check_images("resize", images)
    if images.dtype != "uint8":
        raise ValueError(f"resize expects images of uint8, values 0 to 255, got {images.dtype}")
    xp, size = array_module(images), int(size)
    N, H, W, C = images.shape
    rows, columns = (xp.asarray(triangle_weights(side, size)) for side in (H, W))  # (size, H), (size, W)
    x = rows @ images.reshape(N, H, W * C).astype(xp.float32)  # (N, size, W*C)
    x = columns @ x.reshape(N, size, W, C)  # (N, size, size, C)
    return ((x + 2**15) // 2**16).astype(xp.uint8)


def triangle_weights(side, size):
    """Return how much of each of `side` old pixels is in each of `size` new ones, in parts of 256.

    Shapes      ->  (size, side) float32, integers whose rows add up to 256
    """
    ratio = side / size
    centre = (np.arange(size) + 0.5) * ratio - 0.5  # of each new pixel, in old ones
    weights = np.maximum(1 - np.abs(np.arange(side) - centre[:, None]) / max(1, ratio), 0)  # (size, side)
    shares = 256 * weights.cumsum(axis=1) / weights.sum(axis=1, keepdims=True)
    return np.diff(np.rint(shares), axis=1, prepend=0).astype(np.float32)  # rounded so that each row has its 256


def check_images(name, images):
    if getattr(images, "ndim", 0) != 4:  # a single image would pass for many: its rows for images, mirrored one by one
        shape = getattr(images, "shape", f"a {type(images).__name__}")
        raise ValueError(f"{name} expects images (N, H, W, C), got {shape}")


def draw_below(limit, words):
    """Turn random 32-bit words into integers from 0 to limit - 1, all equally likely (to limit / 2**32)."""
    xp = array_module(words)
    return ((words.astype(xp.uint64) * limit) >> 32).astype(xp.int64)


def normalize(images, mean, std, dtype="float32"):
    """Bring bytes to the range 0 to 1, then subtract each channel's mean and divide by its standard deviation.

    Shapes      images (N, H, W, C) uint8, mean and std of length C  ->  (N, H, W, C)
    Args        dtype: of the result; it is computed in float32
    Raises      ValueError for images of another dtype (floats from 0 to 1 would all become almost the same), and for a
                mean and deviations that do not fit
    """
    check_images("normalize", images)
    xp = array_module(images)
    if images.dtype != "uint8":
        raise ValueError(f"normalize expects images of uint8, values 0 to 255, got {images.dtype}")
    if not images.shape[3] == len(mean) == len(std) or not all(s > 0 for s in std):
        raise ValueError(
            f"normalize expects a mean and a deviation above 0 for each channel of {images.shape}, got {mean} and {std}"
        )
    scale = xp.asarray([1 / (255 * s) for s in std], dtype=xp.float32)
    shift = xp.asarray([m / s for m, s in zip(mean, std, strict=True)], dtype=xp.float32)
    return (images * scale - shift).astype(dtype, copy=False)
