"""Say what is on a picture: the three most probable classes of each image file.

    python examples/predict.py runs/my-run/best.safetensors cat.png dog.jpg

A picture of any size is cut to its largest centred square and scaled down to 32x32 pixels, which is what the network
has learned on. Reading pictures needs Pillow: pip install -e ".[plot]".
"""

import argparse
import pathlib

import numpy as np

from minires import cifar10
from minires.backend import choose_device
from minires.training import load_model
from minires.training.script import run_script
from minires.training.weights import logits_of

TOP = 3


def main():
    parser = argparse.ArgumentParser(description="Say what is on a picture.", allow_abbrev=False)
    parser.add_argument("checkpoint", type=pathlib.Path, help="a safetensors file")
    parser.add_argument("images", nargs="+", metavar="IMAGE", type=pathlib.Path, help="a PNG or JPEG file")
    parser.add_argument("--device", choices=["auto", "cpu", "gpu"], default="auto")
    parser.add_argument("--debug", action="store_true", help="errors with a traceback")
    args = parser.parse_args()

    images = np.stack([read_image(path) for path in args.images])  # (N, 32, 32, 3) uint8
    device = choose_device(args.device)
    model, _ = load_model(args.checkpoint)
    logits = logits_of(model.to(device), images, args.checkpoint)  # (N, 10)
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = exp / exp.sum(axis=1, keepdims=True)

    for path, row in zip(args.images, probabilities, strict=True):
        best = np.argsort(row)[::-1][:TOP]
        print(f"{path}: " + ", ".join(f"{cifar10.CLASSES[k]} {row[k]:.1%}" for k in best))
    return 0


def read_image(path):
    """Return the largest centred square of a picture, scaled to (32, 32, 3) uint8.

    Raises      DataError for a file that is missing or no picture, or without Pillow
    """
    try:
        from PIL import Image, ImageOps
    except ModuleNotFoundError:
        raise cifar10.DataError('reading pictures needs Pillow: pip install -e ".[plot]"') from None
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits a pixel, which convert would cut off at 255
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            white = Image.new("RGBA", image.size, "white")  # what shows through where the picture is transparent
            image = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
            return np.asarray(ImageOps.fit(image, (32, 32)))
    except FileNotFoundError:
        raise cifar10.DataError(f"{path} is missing; expected a PNG or JPEG file") from None
    except (OSError, Image.DecompressionBombError) as error:
        raise cifar10.DataError(f"{path} is no picture that Pillow can read: {error}") from error


if __name__ == "__main__":
    run_script(main)
