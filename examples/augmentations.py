"""Draw what each augmentation does to one image: the picture in README.md beside this file.

python examples/augmentations.py            writes augmentations.png
"""

import argparse

import numpy as np

from minires import augment, plots
from minires.cifar10 import load_sample
from minires.training.arguments import at_least, folder
from minires.training.script import run_script
from minires.trivial_augment import OPERATIONS, change, trivial_augment


def main():
    parser = argparse.ArgumentParser(
        description="Draw what each augmentation does to one image of the sample.", allow_abbrev=False
    )
    parser.add_argument(
        "--image", type=at_least(0, below=1000), default=256, metavar="N", help="of the sample's training images"
    )
    parser.add_argument(
        "--strength",
        type=at_least(0, below=31),
        default=15,
        metavar="N",
        help="of TrivialAugment's operations, from 0 to 30; default 15",
    )
    parser.add_argument("--out", type=folder, default="augmentations.png", metavar="FILE")
    parser.add_argument("--debug", action="store_true", help="errors with a traceback")
    args = parser.parse_args()

    images = load_sample().train_images[args.image : args.image + 1]
    pictures = {
        "as it is": images,
        "crop": augment.random_crop(images, key=1, epoch=1),
        "flip": images[:, :, ::-1],
        "cutout 8": augment.cutout(images, key=1, epoch=1, size=8),
    }
    for i, operation in enumerate(OPERATIONS[1:], start=1):
        settings = (np.array([value]) for value in (i, args.strength, 1 if operation in ("color", "rotate") else 0))
        pictures[operation] = change(images, *settings)
    pictures["TrivialAugment\nand cutout"] = augment.cutout(trivial_augment(images, 2, 1), 2, 1, size=16)
    plots.plot_images(np.concatenate(list(pictures.values())), list(pictures), args.out, columns=9)


if __name__ == "__main__":
    run_script(main)
