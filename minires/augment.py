"""What is done to a batch of images before the network sees it: random crop, random flip, normalisation.

Pure functions on whole batches, on CPU and GPU. Random ones are given a key (the seed of the run) and the training
step; the same two give the same result, and the draws of the two functions are independent of each other.

Source      the augmentation of He et al. 2016, section 4.2
"""

from minires.backend import array_module
from minires.rng import random_words

CROP_STREAM, FLIP_STREAM = 1, 2


def random_crop(images, key, step, padding=4):
    """Move each image by up to `padding` pixels each way, and fill the border with black.

    It is the crop of an H x W window from the image with a border of `padding` black pixels; all (2 padding + 1)^2
    windows are equally likely.

    Shapes      images (N, H, W, C) uint8  ->  the same
    """
    xp = array_module(images)
    N, H, W, _ = images.shape
    words = random_words(N, key, step, CROP_STREAM, xp=xp)[:, :2].astype(xp.uint64)
    corner = ((words * (2 * padding + 1)) >> 32).astype(xp.int64)  # (N, 2), from 0 to 2 padding
    rows = corner[:, 0, None] + xp.arange(H)  # (N, H)
    cols = corner[:, 1, None] + xp.arange(W)  # (N, W)
    padded = xp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    return padded[xp.arange(N)[:, None, None], rows[:, :, None], cols[:, None, :]]


def random_flip(images, key, step, p=0.5):
    """Mirror each image, left for right, with probability p.

    Shapes      images (N, H, W, C)  ->  the same
    """
    xp = array_module(images)
    word = random_words(len(images), key, step, FLIP_STREAM, xp=xp)[:, 0].astype(xp.uint64)
    return xp.where((word < int(p * 2**32))[:, None, None, None], images[:, :, ::-1], images)


def normalize(images, mean, std):
    """Bring bytes to the range 0 to 1, then take off each channel's mean and divide by its standard deviation.

    Shapes      images (N, H, W, C) uint8, mean and std of length C  ->  (N, H, W, C) float32
    """
    xp = array_module(images)
    scale = xp.asarray([1 / (255 * s) for s in std], dtype=xp.float32)
    shift = xp.asarray([m / s for m, s in zip(mean, std, strict=True)], dtype=xp.float32)
    return images * scale - shift
