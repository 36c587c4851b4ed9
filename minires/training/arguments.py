"""Types for argparse: what a flag may be, and what is said where it is something else; the data of --data."""

import argparse
import math
import os
import pathlib
import re

from minires import cifar10


def data_folder(text):
    """Return "sample", or the absolute path of a folder, which is right wherever a run is resumed from."""
    if not text:
        raise argparse.ArgumentTypeError(
            "expected sample or a folder, got an empty name; leave --data out for the default"
        )
    return text if text == "sample" else str(folder(text).absolute())


def folder(text):
    """Return a path; ~ is the home folder, which a shell leaves to us in --out=~/runs."""
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise argparse.ArgumentTypeError(f"there is no home folder for {text}: name it, or write ./{text}")
    return pathlib.Path(path)


def read_data(data):
    """Read the sample, or a folder with CIFAR-10, which is downloaded where none is named."""
    return cifar10.load_sample() if data == "sample" else cifar10.load(data, or_download=True)


def at_least(least, below=math.inf):
    def integer(text):
        if not re.fullmatch("-?[0-9]+", text) or not least <= int(text) < below:
            limit = "" if below == math.inf else f" and below {below}"
            raise argparse.ArgumentTypeError(f"expected an integer of at least {least}{limit}, got {text}")
        return int(text)

    return integer


def number(expected, valid):
    def real_number(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not valid(value):
            raise argparse.ArgumentTypeError(f"expected a number {expected}, got {text}")
        return value

    return real_number


positive = number("above 0", lambda value: 0 < value < math.inf)
not_negative = number("of at least 0", lambda value: 0 <= value < math.inf)
probability = number("from 0 to below 1", lambda value: 0 <= value < 1)
