"""The pictures of the lessons, drawn from what minires computes.

    python examples/lessons/pictures.py                     writes all of them into this folder
    python examples/lessons/pictures.py --out DIR           or into another one

A function returns a matplotlib figure; PICTURES gives it the name of its file. Each is drawn at fixed places, without a
layout that depends on the width of letters, so that the tests can compare the files with what is drawn here.
"""

import argparse
import pathlib

import ingredients
import numpy as np
import residual

import minires
from minires.kernels import reference
from minires.plots import figure_class
from minires.training.arguments import folder
from minires.training.script import run_script

HERE = pathlib.Path(__file__).resolve().parent
DOTS_PER_INCH = 100
FORWARD, BACKWARD, INK, PALE, MARKED = "#1f5fae", "#c0571b", "#1b2a3a", "#e8eef7", "#f6d7a8"


def canvas(width, height):
    """Return a figure and axes that fill it, without a frame: one unit is an inch, (0, 0) the lower left corner."""
    figure = figure_class()(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def arrow(axes, start, end, color):
    style = {"arrowstyle": "-|>", "color": color, "lw": 1.8, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 14}
    axes.annotate("", end, start, arrowprops=style)


def residual_block():
    """A residual block, and below it the two gradients that flow back through it and are added."""
    figure, axes = canvas(9, 4.5)
    for row, color in ((3.1, FORWARD), (1.0, BACKWARD)):
        forward = color == FORWARD

        def flow(left, right, color=color, forward=forward):
            arrow(axes, left if forward else right, right if forward else left, color)

        # F: two convolutions. The shortcut goes above it, from the fork (1.5) to the sum (6.75).
        for middle, width, name in (
            (2.6, 0.8, "conv1"),
            (3.85, 1.0, "bn1, ReLU"),
            (5.0, 0.8, "conv2"),
            (6.0, 0.6, "bn2"),
        ):
            box(axes, middle, row, width, name)
        for left, right in ((0.65, 2.2), (3.0, 3.35), (4.35, 4.6), (5.4, 5.7), (6.3, 6.6), (6.9, 7.2), (7.8, 8.35)):
            flow((left, row), (right, row))
        axes.plot([1.5, 1.5, 6.75, 6.75], [row, row + 0.75, row + 0.75, row], color=color, lw=1.8, zorder=0)
        axes.plot([6.6, 6.9], [row, row], color=color, lw=1.8, zorder=0)
        flow((3.8, row + 0.75), (4.2, row + 0.75))
        box(axes, 7.5, row, 0.6, "ReLU")
        for x in (6.75,) if forward else (6.75, 1.5):
            circle(axes, x, row, color, filled=not forward and x == 6.75)
        axes.add_patch(dashed(2.08, row - 0.33, 4.34, 0.66, color))
        label(axes, 4.25, row - 0.5, "F", color)

    label(axes, 0.4, 3.1, "x", FORWARD)
    label(axes, 4.0, 4.05, "the shortcut: x as it is", FORWARD)
    label(axes, 6.75, 2.65, "F(x) + x", FORWARD)
    label(axes, 8.6, 3.1, "out", FORWARD)
    label(axes, 8.65, 1.0, "dout", BACKWARD)
    label(axes, 6.95, 0.5, "the same g\ngoes both ways", BACKWARD)
    label(axes, 4.0, 1.95, "the shortcut: g as it is", BACKWARD)
    label(axes, 1.5, 0.5, "added:\nwhat came through F, and g", BACKWARD)
    label(axes, 0.35, 1.0, "dx", BACKWARD)
    return figure


def box(axes, x, y, width, text):
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x - width / 2, y - 0.2), width, 0.4, facecolor=PALE, edgecolor=INK, lw=1))
    axes.text(x, y, text, ha="center", va="center", size=10, color=INK)


def dashed(x, y, width, height, color):
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, fill=False, edgecolor=color, lw=1, ls="--")


def circle(axes, x, y, color, filled):
    """Where two ways meet and are added; filled where one parts into two."""
    from matplotlib.patches import Circle

    radius = 0.06 if filled else 0.15
    axes.add_patch(Circle((x, y), radius, facecolor=color if filled else "white", edgecolor=color, lw=1.8, zorder=3))
    if not filled:
        axes.plot([x - 0.08, x + 0.08], [y, y], color=color, lw=1.8, zorder=4)
        axes.plot([x, x], [y - 0.08, y + 0.08], color=color, lw=1.8, zorder=4)


def label(axes, x, y, text, color=INK, **style):
    axes.text(x, y, text, ha="center", va="center", color=color, **{"size": 10.5} | style)


def im2col():
    """A 4x4 image, what a 3x3 window shows at its four positions, and what col2im adds to each pixel."""
    figure, axes = canvas(9, 3.5)
    image = np.arange(1, 17).reshape(1, 4, 4, 1)
    columns = reference.im2col(image, (3, 3), stride=1, padding=0)  # (1, 2, 2, 9)
    image_again = reference.col2im(columns, image.shape, (3, 3), stride=1, padding=0)
    image, columns, image_again = image.reshape(4, 4), columns.reshape(4, 9), image_again.reshape(4, 4)
    marked = 6  # a pixel that all four windows show
    for left, numbers, is_marked, title, below in (
        (0.35, image, image == marked, "an image of 4x4 pixels", "the window shows 3x3 of them"),
        (2.75, columns, columns == marked, "im2col: a row for each position", "the nine numbers that it shows there"),
        (7.0, image_again, image == marked, "col2im of these rows", "each goes back, and adds up"),
    ):
        middle = left + SIDE * numbers.shape[1] / 2
        grid(axes, left, 0.9, numbers, is_marked)
        label(axes, middle, 2.95, title, weight="bold")
        label(axes, middle, 0.6, below, size=9)
    outline(axes, 0.35, 0.9 + SIDE, 3, 3)
    outline(axes, 2.75, 0.9 + 3 * SIDE, 9, 1)
    arrow(axes, (2.17, 1.8), (2.68, 1.8), FORWARD)
    arrow(axes, (6.74, 1.8), (6.97, 1.8), BACKWARD)
    label(
        axes, 4.5, 0.22, "The pixel 6 is in all four windows: 6 + 6 + 6 + 6 = 24. The pixel 1 is in one, and stays 1."
    )
    return figure


SIDE = 0.44  # of the square of a number, in inches


def grid(axes, left, bottom, numbers, marked):
    """Write numbers into squares, the first row on top."""
    from matplotlib.patches import Rectangle

    rows = len(numbers)
    for (row, column), number in np.ndenumerate(numbers):
        x, y = left + column * SIDE, bottom + (rows - 1 - row) * SIDE
        color = MARKED if marked[row, column] else "white"
        axes.add_patch(Rectangle((x, y), SIDE, SIDE, facecolor=color, edgecolor="gray", lw=0.8))
        axes.text(x + SIDE / 2, y + SIDE / 2, str(number), ha="center", va="center", size=10, color=INK)


def outline(axes, left, bottom, columns, rows):
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((left, bottom), columns * SIDE, rows * SIDE, fill=False, edgecolor=FORWARD, lw=2.5))


def gradient_norms():
    """The norm of the gradient on its way back through 20 blocks, plain and residual, of three networks each."""
    figure = figure_class()(figsize=(7, 4))
    axes = figure.add_axes((0.1, 0.14, 0.87, 0.78))
    images, labels = residual.halved_images()
    for name, shortcut, color in (("plain", False, BACKWARD), ("residual", True, FORWARD)):
        for seed in range(3):
            norms = residual.gradient_norms(residual.network(20, shortcut, seed), images[:100], labels[:100])
            axes.plot(range(1, 21), norms, "o-", ms=3, lw=1.2, color=color, label=name if seed == 0 else None)
    axes.set(yscale="log", xlim=(0.5, 20.5), ylim=(1e-3, 10), xticks=(1, 5, 10, 15, 20))
    axes.set_title("norm of the gradient that leaves each block, before training", size=11)
    axes.set_xlabel("block; the gradient comes from the right")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    return figure


def filters():
    """The 64 filters of the first layer, as they are drawn at random and as training has made them."""
    figure, axes = canvas(8, 4.4)
    models = ("before training", minires.ResNet(seed=0)), ("after training", minires.pretrained())
    for left, (title, model) in zip((0.2, 4.2), models, strict=True):
        weight = model.conv1.weight.data.transpose(3, 0, 1, 2)  # (64, 3, 3, 3): a picture of 3x3 pixels for each filter
        largest = np.abs(weight).max(axis=(1, 2, 3), keepdims=True)
        colors = 0.5 + 0.5 * weight / np.maximum(largest, 1e-3)  # 0 is gray, and a filter that decay has left near 0
        tiles = np.ones((64, 4, 4, 3))  # with a white line after each
        tiles[:, :3, :3] = colors
        mosaic = tiles.reshape(8, 8, 4, 4, 3).transpose(0, 2, 1, 3, 4).reshape(32, 32, 3)
        sharp = mosaic.repeat(11, axis=0).repeat(11, axis=1)  # each pixel becomes 11x11
        axes.imshow(sharp, extent=(left, left + 3.6, 0.2, 3.8), aspect="auto", interpolation="nearest")
        label(axes, left + 1.75, 4.1, title, weight="bold")
    axes.set(xlim=(0, 8), ylim=(0, 4.4))
    return figure


def ingredients_of_a_recipe():
    """The curves of the kept runs of lesson 7, and what each ingredient is worth there."""
    figure = figure_class()(figsize=(10, 4))
    curves, worth = figure.add_axes((0.06, 0.13, 0.4, 0.77)), figure.add_axes((0.66, 0.13, 0.32, 0.77))
    rows = ingredients.read()
    for variant, color in zip(ingredients.CURVES, (FORWARD, BACKWARD, "tab:green"), strict=True):
        of_variant = [row for row in rows if row["variant"] == variant]
        for seed in sorted({row["seed"] for row in of_variant}):
            of_seed = [row for row in of_variant if row["seed"] == seed]
            epochs = [int(row["epoch"]) for row in of_seed]
            for part, line in (("train", ":"), ("test", "-")):
                values = [100 * float(row[part]) for row in of_seed]
                curves.plot(
                    epochs, values, line, lw=1.5, color=color, label=variant if part + seed == "test0" else None
                )
    curves.set_title("percent right: test images, and dotted in training", size=11)
    curves.set(xlabel="epoch", xlim=(0, ingredients.EPOCHS + 1), ylim=(15, 105))
    curves.grid(alpha=0.3)
    curves.legend(loc="upper right", bbox_to_anchor=(1, 0.93))

    without = [variant for variant in ingredients.VARIANTS if variant != "the recipe"]
    for row, variant in enumerate(without):
        points = ingredients.differences(ingredients.at_the_end(rows), variant)
        worth.plot(points, [row] * len(points), "o", ms=5, color=FORWARD, alpha=0.6)
        worth.plot([points.mean()], [row], "|", ms=16, mew=2, color=BACKWARD)
    worth.axvline(0, color=INK, lw=1)
    worth.set_title("the recipe is better by, points", size=11)
    worth.set_yticks(range(len(without)), without)
    worth.set_ylim(len(without) - 0.5, -0.5)
    worth.grid(alpha=0.3)
    return figure


PICTURES = {
    "residual_block.png": residual_block,
    "im2col.png": im2col,
    "gradient_norms.png": gradient_norms,
    "filters.png": filters,
    "ingredients.png": ingredients_of_a_recipe,
}


def draw(name):
    """Return the figure of a picture, whatever style the reader's matplotlib is set to."""
    figure_class()
    from matplotlib import style

    with style.context("default"):
        return PICTURES[name]()


def save(figure, path):
    """Write a PNG that also holds, as its description, the words in it."""
    description = "\n".join(text.get_text() for text in texts(figure))
    metadata = {"Software": None, "Description": description}  # the name of the software would change with its version
    figure.savefig(path, dpi=DOTS_PER_INCH, facecolor="white", metadata=metadata)


def texts(figure):
    """Return what is written in a figure, as matplotlib's Text objects."""
    from matplotlib.text import Text

    figure.set_dpi(DOTS_PER_INCH)
    figure.draw_without_rendering()  # which gives the axes their numbers
    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]


def main():
    parser = argparse.ArgumentParser(description="Draw the pictures of the lessons.", allow_abbrev=False)
    parser.add_argument("--out", type=folder, default=HERE, metavar="DIR", help="default: the folder of the lessons")
    parser.add_argument("--debug", action="store_true", help="errors with a traceback")
    args = parser.parse_args()
    pathlib.Path(args.out).mkdir(parents=True, exist_ok=True)
    for name in PICTURES:
        save(draw(name), pathlib.Path(args.out) / name)
        print(pathlib.Path(args.out) / name)


if __name__ == "__main__":
    run_script(main)
