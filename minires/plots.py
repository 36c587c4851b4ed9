"""Pictures of a run, drawn with matplotlib where it is installed: pip install -e ".[plot]".

They go straight into files: there is no window, and none of matplotlib's backends is needed.
"""

import contextlib
import math
import os
import sys


def plot_curves(history, path):
    """Draw loss and accuracy, training and validation, over the epochs.

    Args        history: a list of dicts with epoch, train_loss, validation_loss, train_accuracy, validation_accuracy,
                those of validation None where there was none; path: where the picture goes, in the format of its ending
    """
    figure = figure_class()(figsize=(9, 3.5), layout="constrained")
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for part, label, color in (("train", "training", "tab:blue"), ("validation", "validation", "tab:orange")):
            points = [(row["epoch"], row[f"{part}_{quantity}"]) for row in history]
            points = [point for point in points if point[1] is not None]
            if points:
                axes.plot(*zip(*points, strict=True), "o-", ms=3, color=color, label=label)
        axes.set(xlabel="epoch", title=quantity)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)


def plot_images(images, titles, path, columns=10):
    """Draw a grid of images, each under its title.

    Shapes      images (N, H, W, 3) uint8, titles N strings
    """
    rows = math.ceil(len(images) / columns)
    figure = figure_class()(figsize=(columns, 1.2 * rows), layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, image, title in zip(figure.axes, images, titles, strict=False):
        axes.imshow(image)
        axes.set_title(title, fontsize=8)
    figure.savefig(path, dpi=150)


def plot_runs(values, title, path):
    """Draw a row for each variant: a dot for each of its runs, and a line at their mean.

    Args        values: {variant: a number for each run}; title: what the numbers are; path: where the picture goes
    """
    figure = figure_class()(figsize=(8, 1 + 0.35 * len(values)), layout="constrained")
    axes = figure.subplots()
    for row, numbers in enumerate(values.values()):
        axes.plot(numbers, [row] * len(numbers), "o", ms=5, color="tab:blue", alpha=0.6)
        axes.plot([sum(numbers) / len(numbers)], [row], "|", ms=16, mew=2, color="tab:orange")
    axes.set_yticks(range(len(values)), list(values))
    axes.invert_yaxis()  # in the order of the table
    axes.set_xlabel(title)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def figure_class():
    """Import matplotlib's Figure, without pyplot and its global state, whatever MPLBACKEND says.

    Why         A notebook exports MPLBACKEND to what it starts, and `import matplotlib` raises a ValueError where that
                backend is not installed. So the import does not see it, and it is chosen afterwards if it can be, for
                whoever draws on the screen in the same process.
    """
    if "matplotlib" not in sys.modules:
        backend = os.environ.pop("MPLBACKEND", None)
        try:
            import matplotlib
        except ModuleNotFoundError as error:
            if error.name != "matplotlib":
                raise
            raise ModuleNotFoundError(
                'pictures need matplotlib: pip install -e ".[plot]"', name="matplotlib"
            ) from error
        finally:
            if backend is not None:
                os.environ["MPLBACKEND"] = backend
        if backend:
            with contextlib.suppress(ValueError):
                matplotlib.rcParams["backend"] = backend
    from matplotlib.figure import Figure

    return Figure
