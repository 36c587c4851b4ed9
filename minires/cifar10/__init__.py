"""CIFAR-10 in its official binary files: 50,000 training and 10,000 test images, 32x32 pixels, ten classes.

    data = cifar10.load_sample()                 1,000 and 500 of them, which come with the package
    data = cifar10.load()                        all, from the default folder
    python -m minires.cifar10 download           bring them there

Source      Krizhevsky 2009, "Learning multiple layers of features from tiny images"; the format is described at
            https://www.cs.toronto.edu/~kriz/cifar.html
"""

import hashlib
import os
import pathlib
from typing import NamedTuple

import numpy as np

from minires.cifar10 import files
from minires.cifar10.download import DownloadError  # noqa: F401  (part of what this package offers)
from minires.cifar10.files import DataError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# statistics(load(directory).train_images), the channels' means and standard deviations of the 50,000 training images
MEAN = (0.49139968, 0.48215841, 0.44653091)
STD = (0.24703223, 0.24348513, 0.26158784)


class Dataset(NamedTuple):
    """Images (N, 32, 32, 3) uint8, red, green, blue from 0 to 255; labels (N,) int64, positions in CLASSES."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray

    def sha256(self):
        """Return the SHA-256 of those of the four arrays, in hexadecimal: does a run have the images it began with?"""
        parts = [hashlib.sha256(np.ascontiguousarray(array)).digest() for array in self]
        return hashlib.sha256(b"".join(parts)).hexdigest()


def load(directory=None, or_download=False):
    """Read the whole of CIFAR-10 from the six official binary files, and make sure that they are those, byte for byte.

    Args        directory: the folder with the files, or the one in which the official archive was unpacked; None for
                the default, $MINIRES_DATA or else ~/.cache/minires
                or_download: download the files where the default folder has none
    Returns     a Dataset
    Raises      DataError for a folder that does not exist or cannot be entered, and a file that is missing, cannot be
                read, or has the wrong size or another SHA-256 than the official one; DownloadError
    """
    folder = pathlib.Path(os.path.expanduser(directory or default_directory()))
    place = files.find(folder)
    if not directory and not place:
        if not or_download:
            raise DataError(
                f"no CIFAR-10 in {folder}. Three ways out: python -m minires.cifar10 download brings it there, "
                "load(DIR) (or MINIRES_DATA) names the folder that has it, and load_sample() takes the built-in sample"
            )
        place = files.download(folder)
    return _dataset(files.read(place or folder, files.OFFICIAL))


def load_sample():
    """Read the sample that comes with the package: the first 100 training and 50 test images of each class.

    Returns     a Dataset of 1,000 and 500 images, in the order of the official files
    """
    expected = {"data_batch_1.bin": (1_000, None), files.TEST_FILE: (500, None)}
    return _dataset(files.read(pathlib.Path(__file__).parent / "sample", expected, "installing minires anew"))


def _dataset(contents):
    """Take records apart: the label, then 1,024 red, 1,024 green and 1,024 blue values, row by row from the top left.

    Args        contents: for each file its records (N, 3073) uint8; the last are the test images
    """
    *train, test = contents
    parts = []
    for records in (np.concatenate(train), test):
        planes = records[:, 1:].reshape(-1, 3, 32, 32)
        parts += [np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), records[:, 0].astype(np.int64)]
    return Dataset(*parts)


def default_directory():
    """Return the folder where the data is looked for: $MINIRES_DATA, or else ~/.cache/minires.

    Raises      DataError where there is neither the one nor a home folder
    """
    named = os.environ.get("MINIRES_DATA")
    try:
        return pathlib.Path(named or "~/.cache/minires").expanduser()
    except RuntimeError:
        where = f"for MINIRES_DATA, which is {named}" if named else "here, where CIFAR-10 would be"
        raise DataError(
            f"there is no home folder {where}: let MINIRES_DATA name one, or name the folder (load(DIR), "
            "download DIR, verify DIR, --data DIR)"
        ) from None


def statistics(images):
    """Return the means and the standard deviations of the three channels, with values from 0 to 1.

    Every value is counted first, so that the sums are exact. Some published deviations are means of each image's own
    deviation, (0.2023, 0.1994, 0.2010): that is another and smaller number.

    Shapes      images (N, H, W, 3) uint8  ->  mean (3,), std (3,), float64
    Raises      ValueError for images of another dtype, or none
    """
    if images.dtype != np.uint8 or not images.size:
        raise ValueError(f"statistics expects images of uint8, at least one, got {images.shape} of {images.dtype}")
    values = np.arange(256) / 255
    counts = np.stack([np.bincount(images[..., c].reshape(-1), minlength=256) for c in range(3)])  # (3, 256)
    shares = counts / counts.sum(axis=1, keepdims=True)
    mean = shares @ values
    return mean, np.sqrt(shares @ values**2 - mean**2)


def split(count, fraction=0.2, seed=0):
    """Divide the indices 0 to count - 1 at random into two parts, for training and for validation.

    Args        fraction: the part for validation, rounded to whole images; seed: the same seed, the same split
    Returns     two arrays of indices, in random order
    Raises      ValueError for a fraction that leaves one of the parts empty
    """
    validation = round(count * fraction) if 0 < fraction < 1 else 0  # NaN too
    if not 0 < validation < count:
        raise ValueError(f"split: fraction {fraction} of {count} images leaves one of the two parts empty")
    order = np.random.default_rng(seed).permutation(count)
    return order[validation:], order[:validation]
