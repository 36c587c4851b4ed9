"""CIFAR-10 in its official binary files: 50,000 training and 10,000 test images, 32x32 pixels, ten classes.

A file is a row of records of 3,073 bytes: the label, then the 1,024 red, 1,024 green and 1,024 blue values of the
image, row by row from the top left. A small sample of the same images comes with the package.

    python -m minires.cifar10 download [DIR]     bring the files into DIR, by default ~/.cache/minires
    python -m minires.cifar10 verify [DIR]       tell whether the files there are right, byte for byte

Source      Krizhevsky 2009, "Learning multiple layers of features from tiny images"; the format is described at
            https://www.cs.toronto.edu/~kriz/cifar.html
"""

import argparse
import os
import pathlib
import sys
from typing import NamedTuple

import numpy as np

from minires.archives import DataError
from minires.cifar10_files import (
    RECORDS,
    SHA256,
    TEST_FILES,
    TRAIN_FILES,
    check_folder,
    download,
    find,
    read_records,
    verify,
)
from minires.download import DownloadError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# statistics(load(directory).train_images), the channels' means and standard deviations of the 50,000 training images
MEAN = (0.49139968, 0.48215841, 0.44653091)
STD = (0.24703223, 0.24348513, 0.26158784)


class Dataset(NamedTuple):
    """Images (N, 32, 32, 3) uint8, red, green, blue from 0 to 255; labels (N,) int64, places in CLASSES."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load(directory=None, or_download=False):
    """Read the whole of CIFAR-10 from the six official binary files, and make sure that they are those, byte for byte.

    Args        directory: the folder with the files, or the one in which the official archive was unpacked; None for
                the default, $MINIRES_DATA or else ~/.cache/minires
                or_download: download the files where the default folder has none
    Returns     a Dataset
    Raises      DataError for a folder that does not exist or cannot be entered, and a file that is missing, cannot be
                read, or has the wrong size, a label above 9 or another SHA-256 than the official one; DownloadError
    """
    folder = pathlib.Path(directory or default_directory())
    place = find(folder)
    if not directory and not place:
        if not or_download:
            raise DataError(
                f"no CIFAR-10 in {folder}. Three ways out: python -m minires.cifar10 download brings it there, --data "
                "DIR (or MINIRES_DATA) names the folder that has it, and --data sample takes the built-in sample"
            )
        place = download(folder)
    check_folder(place or folder)
    return _read_files(place or folder, TRAIN_FILES, RECORDS, TEST_FILES, RECORDS, SHA256)


def load_sample():
    """Read the sample that comes with the package: the first 100 training and 50 test images of each class.

    Returns     a Dataset of 1,000 and 500 images, in the order of the official files
    """
    return _read_files(pathlib.Path(__file__).parent / "sample", TRAIN_FILES[:1], 1_000, TEST_FILES, 500, {})


def default_directory():
    """Return the folder where the data is looked for: $MINIRES_DATA, or else ~/.cache/minires."""
    return pathlib.Path(os.environ.get("MINIRES_DATA") or pathlib.Path.home() / ".cache" / "minires")


def statistics(images):
    """Return the means and the standard deviations of the three channels, with values from 0 to 1.

    Every value is counted first, so that the sums are exact. Some published deviations are means of each image's own
    deviation, (0.2023, 0.1994, 0.2010): that is another and smaller number.

    Shapes      images (N, H, W, 3) uint8  ->  mean (3,), std (3,), float64
    """
    values = np.arange(256) / 255
    counts = np.stack([np.bincount(images[..., c].reshape(-1), minlength=256) for c in range(3)])  # (3, 256)
    shares = counts / counts.sum(axis=1, keepdims=True)
    mean = shares @ values
    return mean, np.sqrt(shares @ values**2 - mean**2)


def split(count, fraction=0.2, seed=0):
    """Divide the numbers 0 to count - 1 at random into two parts, for training and for validation.

    Args        fraction: the part for validation, rounded to whole images; seed: the same seed, the same split
    Returns     two arrays of numbers, in random order
    Raises      ValueError for a fraction that leaves one of the parts empty
    """
    validation = round(count * fraction)
    if not 0 < validation < count:
        raise ValueError(f"split: fraction {fraction} of {count} images leaves one of the two parts empty")
    order = np.random.default_rng(seed).permutation(count)
    return order[validation:], order[:validation]


def _read_files(directory, train_files, train_records, test_files, test_records, sha256):
    train = [_read(directory / name, train_records, sha256.get(name)) for name in train_files]
    test = [_read(directory / name, test_records, sha256.get(name)) for name in test_files]
    return Dataset(*map(np.concatenate, zip(*train, strict=True)), *map(np.concatenate, zip(*test, strict=True)))


def _read(path, count, sha256):
    """Read one file of `count` records into images (count, 32, 32, 3) uint8 and labels (count,) int64."""
    records = read_records(path, count, sha256)
    planes = records[:, 1:].reshape(count, 3, 32, 32)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), records[:, 0].astype(np.int64)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m minires.cifar10", description="Download CIFAR-10, or verify it.", allow_abbrev=False
    )
    parser.add_argument("command", choices=["download", "verify"])
    parser.add_argument("directory", nargs="?", metavar="DIR", help="default $MINIRES_DATA or ~/.cache/minires")
    parser.add_argument("--debug", action="store_true", help="show where in the program an error comes from")
    args = parser.parse_intermixed_args(arguments)  # the other one takes DIR for given once it meets an option
    command = {"download": download, "verify": verify}[args.command]
    try:
        place = command(args.directory or default_directory())
        print(f"{place}: the six files are right, byte for byte")
        return 0
    except (DataError, DownloadError) as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, DataError) else 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on with what has arrived", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
