"""Say what is on a picture: the three most probable classes of each image file, and how probable they are.

    python examples/predict.py cat.png dog.jpg
    python examples/predict.py runs/my-run/best.safetensors cat.png

A file that ends in .safetensors is a network that you have trained; without one, the weights that come with minires
serve. A picture of any size is turned upright, cut to its largest centred square and scaled to the 32x32 pixels that
the network has learned on (bicubic, antialiased). One that cannot be read is named, and the others are classified all
the same. Reading pictures needs Pillow: pip install -e ".[plot]".
"""

import argparse
import contextlib
import os
import pathlib
import warnings

import numpy as np

from minires import cifar10
from minires.backend import choose_device
from minires.console import note
from minires.training import UsageError
from minires.training.script import run_script
from minires.training.weights import load_or_published, logits_of

TOP = 3
SIDE = 32  # pixels
ORIENTATION = 0x0112  # the number of this entry in EXIF, and in TIFF those of others
BITS_PER_SAMPLE, PHOTOMETRIC, MAX_SAMPLE, S_MAX_SAMPLE = 258, 262, 281, 341
LARGEST_CHUNK = 2**26  # bytes of an ICC profile or a text in a PNG; Pillow's own limit, 2**20, some cameras exceed


def main():
    parser = argparse.ArgumentParser(description="Say what is on a picture.", allow_abbrev=False)
    parser.add_argument(
        "files", nargs="+", metavar="FILE", type=pathlib.Path, help="pictures; at most one .safetensors file of weights"
    )
    parser.add_argument(
        "--crop",
        choices=["centre", "none"],
        default="centre",
        help="centre, the default: the largest centred square; none: the whole picture, squeezed into a square",
    )
    parser.add_argument("--device", choices=["auto", "cpu", "gpu"], default="auto")
    parser.add_argument("--debug", action="store_true", help="errors with a traceback")
    args = parser.parse_args()

    networks = [path for path in args.files if path.suffix == ".safetensors"]
    pictures = [path for path in args.files if path.suffix != ".safetensors"]
    if len(networks) > 1:
        raise UsageError(f"expected at most one .safetensors file of weights, got {' and '.join(map(str, networks))}")
    if not pictures:
        raise UsageError(f"expected pictures, got {networks[0]} alone: name a picture after it")
    device = choose_device(args.device)
    model, weights = load_or_published(*networks)

    images = {}  # by path, (32, 32, 3) uint8
    for path in pictures:
        try:
            images[path] = read_image(path, args.crop)
        except PictureError as error:
            note(f"error: {error}")
    if images:
        logits = logits_of(model.to(device), np.stack(list(images.values())), weights)  # (N, 10)
        exp = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = exp / exp.sum(axis=1, keepdims=True)
        for path, row in zip(images, probabilities, strict=True):
            best = np.argsort(row)[::-1][:TOP]
            print(f"{path}: " + ", ".join(f"{cifar10.CLASSES[k]} {row[k]:.1%}" for k in best))
        print(f"No other classes are known than {', '.join(cifar10.CLASSES)}: what is none of them is taken for one.")
    return 0 if len(images) == len(set(pictures)) else 2


class PictureError(ValueError):
    """A picture cannot be classified; the message names the file and the reason."""


def read_image(path, crop="centre"):
    """Return a picture as the network wants it, (32, 32, 3) uint8.

    Of a picture that moves, the first frame; what is transparent becomes white.

    Args        crop: "centre" for the largest centred square, "none" for the whole picture, squeezed
    Raises      PictureError for a file that is missing, no picture, damaged, or does not tell which value is white;
                DataError without Pillow
    """
    try:
        from PIL import Image, PngImagePlugin, UnidentifiedImageError
    except ModuleNotFoundError:
        raise cifar10.DataError('reading pictures needs Pillow: pip install -e ".[plot]"') from None
    PngImagePlugin.MAX_TEXT_CHUNK = LARGEST_CHUNK
    if os.path.isdir(path):  # which, unlike Path.is_dir, is False for what may not be looked at
        raise PictureError(f"{path} is a folder: name the pictures in it")
    try:
        with quiet(), Image.open(path) as image:
            return scaled(eight_bits(image), crop)
    except PictureError as error:
        raise PictureError(f"{path} {error}") from None
    except FileNotFoundError:
        raise PictureError(f"{path} is missing; expected a PNG or JPEG file") from None
    except UnidentifiedImageError:
        raise PictureError(
            f"{path} is no picture that Pillow can read: it has no format that it knows, or a rare form of one"
        ) from None
    except Exception as error:  # the readers of forty formats raise whatever a damaged file leads them to
        reason = " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())
        raise PictureError(f"{path} is no picture that Pillow can read: {reason}") from error


def eight_bits(image):
    """Turn an open picture upright, and bring its values to bytes.

    Returns     a picture of mode RGB
    Raises      PictureError if nothing tells which value is white, or none comes near to it
    """
    from PIL import Image

    with_16_bits = ";16" in str(image.tile)  # Pillow keeps 16 bits of grey, and of colours the upper 8
    image.load()
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # the pixels are fine, whatever is wrong with what is said about them
        orientation = None
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(grey_bytes(image))
    elif with_16_bits:
        check_range(np.asarray(image.convert("RGB")), 255)
    if {"A", "a"} & set(image.getbands()) or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")  # what shows through where the picture is transparent
        image = Image.alpha_composite(white, image)
    image = image.convert("RGB")
    turn = Image.Transpose
    upright = {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_270,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_90,
    }
    return image.transpose(upright[orientation]) if orientation in upright else image


def grey_bytes(image):
    """Return the values of a grey picture of 12 or 16 bits, or of floats from 0 to 1, as bytes.

    White is what a TIFF says it is, else the largest number of so many bits, else 1.0.

    Shapes      mode I;16, I or F, H x W  ->  (H, W) uint8
    """
    values = np.asarray(image, np.float32)
    said = getattr(image, "tag_v2", {})  # of TIFF, tuples
    if told := said.get(S_MAX_SAMPLE) or said.get(MAX_SAMPLE):
        white = told[0]
    elif image.mode.startswith("I;16"):
        white = 2 ** said.get(BITS_PER_SAMPLE, (16,))[0] - 1
    elif image.mode == "F":
        white = 1.0
    elif image.format in ("PNG", "PPM"):  # mode I, of which Pillow makes 16 bits
        white = 2**16 - 1
    else:
        raise PictureError("holds 32-bit integers, of which any may be white: save it with 8 bits")
    check_range(values, white)
    if said.get(PHOTOMETRIC) == 0:  # white is 0
        values = white - values
    return np.round(values * (255 / white)).astype(np.uint8)


def check_range(values, white):
    """Make sure that values lie between 0 and white, and that some come near to it.

    Where all of them are below a quarter, fewer bits are in use than the file says, as those of a camera with 12 bits
    in a file of 16; what would be seen is a black picture.
    """
    lowest, highest = values.min(), values.max()
    if not (lowest >= 0 and white / 4 <= highest <= white):  # NaN neither
        raise PictureError(
            f"holds values from {lowest:,.6g} to {highest:,.6g}, expected from 0 to {white:,.6g}, the largest at least "
            "a quarter of that: save it with 8 bits"
        )


def scaled(image, crop):
    """Return the centred square of a picture of mode RGB, or all of it, as (32, 32, 3) uint8."""
    from PIL import Image

    if crop == "centre":
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


@contextlib.contextmanager
def quiet():
    """Hold back what Pillow warns of, parts of a file that are no pixels, and what the C libraries below it print."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            stderr = os.dup(2)
        except OSError:  # there is none
            yield
            return
        try:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), 2)
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


if __name__ == "__main__":
    run_script(main)
