"""TrivialAugment: each image is changed by one operation, drawn from fourteen, at a strength drawn from all.

A network that sees an object turned, pale or blurred, and is told each time that it is the same object, learns what
does not depend on that. Which operations help, and how strong, is a search of its own for each data set. TrivialAugment
leaves the search out: it draws one operation for each image, and a strength from a wide range, and does as well.

Sorting the images by operation would mean to look at values on the device, and the host would wait for them. Instead,
every image goes through the same four passes, whose settings differ from image to image. At its neutral setting a pass
leaves an image alone, and an operation is a setting of one pass:

    move_pixels         each pixel is fetched from elsewhere        shear, translate, rotate
    change_values       a table says what becomes of each value     brightness, contrast, posterize, solarize,
                                                                    autocontrast, equalize
    mix with grey       towards grey, or away from it               color
    mix with smooth     towards a smoothed image, or away from it   sharpness

All is computed in integers, so the same bits come out on CPU and GPU.

Source      Müller and Hutter 2021, "TrivialAugment: tuning-free yet state-of-the-art data augmentation", with its wide
            space of strengths; the operations are Pillow's, which the paper uses, to the last bit but for values of
            mixtures and autocontrast, which may be 1 off
"""

import functools
import math

from minires.augment import check_images, draw_below
from minires.backend import array_module
from minires.rng import random_words

OPERATIONS = (
    "identity",
    "shear x",
    "shear y",
    "translate x",
    "translate y",
    "rotate",
    "brightness",
    "color",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
)
STRENGTHS = 31  # from 0, which changes nothing or little, to 30; autocontrast and equalize know no strength
STREAM = 5  # of random numbers; 1 to 4 are those of augment.py
ONE = 2**16  # a number with a fractional part is kept as an integer, its multiple of 1 / ONE, rounded


def trivial_augment(images, key, epoch, start=0):
    """Change each image by one operation, drawn from fourteen, at a strength and in a direction that are drawn too.

    Args        key, epoch, start: as in `augment`, where they fix what is drawn
    Shapes      images (N, H, W, 3) uint8  ->  the same
    Raises      ValueError for images of another dtype or number of channels: the operations are defined on bytes
    """
    check_images("trivial_augment", images)
    if images.shape[3] != 3 or images.dtype != "uint8":
        raise ValueError(f"trivial_augment expects images (N, H, W, 3) of uint8, got {images.shape} of {images.dtype}")
    if not images.size:
        return images
    xp = array_module(images)
    words = random_words(len(images), key, epoch, STREAM, xp=xp, start=start)
    operation, strength = draw_below(len(OPERATIONS), words[:, 0]), draw_below(STRENGTHS, words[:, 1])
    return change(images, operation, strength, draw_below(2, words[:, 2]))


def change(images, operation, strength, negative):
    """Change each image by an operation of its own.

    Shapes      images (N, H, W, 3) uint8; operation (N,), indices into OPERATIONS; strength (N,), below STRENGTHS;
                negative (N,), 1 to turn, move or mix the other way where there are two, else 0  ->  the images
    Limits      geometric operations take the nearest pixel, and black from outside the image
    """
    xp = array_module(images)
    table = xp.asarray(settings_table(images.shape[1], images.shape[2]), dtype=xp.int32)
    settings = table[(operation * STRENGTHS + strength) * 2 + negative]  # (N, 12)
    images = move_pixels(images, settings[:, :6])
    images = change_values(images, operation, *settings[:, 6:10].T)
    color, sharpness = settings[:, 10, None, None, None], settings[:, 11, None, None, None]  # (N, 1, 1, 1)
    images = mix(grey(images), images, color).astype(xp.uint8)
    return mix(smooth(images), images, sharpness).astype(xp.uint8)


@functools.cache
def settings_table(H, W):
    """List the settings of all operations at all strengths, in both directions.

    Returns     a list of rows of 12 integers, the neutral ones but for what an operation changes: the matrix of
                `move_pixels` (6), brightness and contrast, the mask of posterize, the threshold of solarize, color and
                sharpness; row (operation STRENGTHS + strength) 2 + negative
    """
    rows = []
    for operation in OPERATIONS:
        for strength in range(STRENGTHS):
            for sign in (1, -1):
                part = strength / (STRENGTHS - 1)  # from 0 to 1
                mixture = 1 + sign * 0.99 * part
                matrix = {
                    "shear x": (1, sign * 0.99 * part, 0, 0, 1, 0),
                    "shear y": (1, 0, 0, sign * 0.99 * part, 1, 0),
                    "translate x": (1, 0, sign * 32 * part, 0, 1, 0),
                    "translate y": (1, 0, 0, 0, 1, sign * 32 * part),
                    "rotate": rotation(sign * 135 * part, H, W),
                }.get(operation, (1, 0, 0, 0, 1, 0))
                rows.append(
                    [
                        *(math.floor(number * ONE + 0.5) for number in at_pixel_centres(matrix)),
                        *(round(ONE * mixture) if operation == name else ONE for name in ("brightness", "contrast")),
                        256 - 2 ** round(6 * part) if operation == "posterize" else 255,
                        math.ceil(255 * (1 - part)) if operation == "solarize" else 256,
                        *(round(ONE * mixture) if operation == name else ONE for name in ("color", "sharpness")),
                    ]
                )
    return rows


def rotation(degrees, H, W):
    """Return the matrix of `move_pixels` that turns an image around its middle, counterclockwise."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = W / 2, H / 2
    return cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y


def at_pixel_centres(matrix):
    """Let a matrix of points take the indices of pixels: the middle of pixel (0, 0) is the point (1/2, 1/2)."""
    a, b, c, d, e, f = matrix
    return a, b, c + (a + b) / 2, d, e, f + (d + e) / 2


def move_pixels(images, matrix):
    """Fill pixel (x, y) of each image with the pixel at (a x + b y + c, d x + e y + f), or black if that is outside.

    Shapes      images (N, H, W, C), matrix (N, 6): a, b, c, d, e, f in multiples of 1 / ONE  ->  the images
    """
    xp = array_module(images)
    N, H, W, _ = images.shape
    a, b, c, d, e, f = matrix.T[:, :, None, None]  # each (N, 1, 1)
    y, x = xp.arange(H, dtype=xp.int32)[:, None], xp.arange(W, dtype=xp.int32)
    from_x, from_y = (a * x + b * y + c) >> 16, (d * x + e * y + f) >> 16  # (N, H, W)
    inside = (from_x >= 0) & (from_x < W) & (from_y >= 0) & (from_y < H)
    pixel = (xp.arange(N)[:, None, None] * H + xp.clip(from_y, 0, H - 1)) * W + xp.clip(from_x, 0, W - 1)
    return images.reshape(N * H * W, -1)[pixel] * inside[:, :, :, None].astype(xp.uint8)


def change_values(images, operation, brightness, contrast, mask, threshold):
    """Replace the values of each image by a table of what becomes of each of the 256 values.

    Shapes      images (N, H, W, 3); the settings (N,)  ->  the images
    """
    xp = array_module(images)
    N, H, W, C = images.shape
    each = (slice(None), None, None)  # a setting of an image, for each of its channels and values
    mean_grey = (grey(images).astype(xp.int64).reshape(N, -1).sum(axis=1) * 2 + H * W) // (2 * H * W)  # (N,), rounded
    values = xp.arange(256, dtype=xp.int32)
    table = mix(0, values, brightness[each])  # (N, 1, 256)
    table = mix(mean_grey.astype(xp.int32)[each], table, contrast[each]) & mask[each]
    table = xp.where(table < threshold[each], table, 255 - table)

    count = xp.zeros(N * C * 256, dtype=xp.int32)
    bins = 256 * xp.arange(N * C).reshape(N, 1, 1, C)
    xp.add.at(count, (images + bins).reshape(-1), 1)  # integers: the order in which a GPU adds does not matter
    count = count.reshape(N, C, 256)
    up_to = count.cumsum(axis=2, dtype=xp.int32)  # how many pixels are no brighter than a value
    lowest = (up_to == 0).sum(axis=2, keepdims=True)  # (N, C, 1)
    highest = 256 - (up_to == H * W).sum(axis=2, keepdims=True)
    spread = xp.clip((values - lowest) * 255 // xp.maximum(highest - lowest, 1), 0, 255)
    table = xp.where((operation == OPERATIONS.index("autocontrast"))[each] & (highest > lowest), spread, table)

    brightest = xp.take_along_axis(count, highest, axis=2)
    step = (H * W - brightest) // 255
    equal = xp.minimum((step // 2 + up_to - count) // xp.maximum(step, 1), 255)
    table = xp.where((operation == OPERATIONS.index("equalize"))[each] & (step > 0), equal, table)
    return table.astype(xp.uint8).reshape(-1)[images + bins]


def mix(a, b, share):
    """Go from a towards b, and for a share above 1 beyond it, within the range of bytes.

    Shapes      a, b integers and share, in multiples of 1 / ONE, of matching shapes  ->  int32
    """
    xp = array_module(share)
    return xp.clip(a + ((share * (b.astype(xp.int32) - a)) >> 16), 0, 255)


def grey(images):
    """Return the brightness of each pixel, by the weights of ITU-R 601-2: 0.299 red + 0.587 green + 0.114 blue.

    Shapes      images (N, H, W, 3)  ->  (N, H, W, 1) int32
    """
    xp = array_module(images)
    red, green, blue = images.astype(xp.int32).transpose(3, 0, 1, 2)[:, :, :, :, None]
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16  # 19595 = round(0.299 ONE), and so on


def smooth(images):
    """Average each pixel, with weight 5, and its eight neighbours; the pixels at the edge stay as they are.

    Shapes      images (N, H, W, C)  ->  the same, int32
    """
    xp = array_module(images)
    out = images.astype(xp.int32)
    columns = out[:, :, :-2] + out[:, :, 1:-1] + out[:, :, 2:]  # (N, H, W - 2, C)
    total = columns[:, :-2] + columns[:, 1:-1] + columns[:, 2:] + 4 * out[:, 1:-1, 1:-1]
    out[:, 1:-1, 1:-1] = (2 * total + 13) // 26  # total / 13, rounded
    return out
