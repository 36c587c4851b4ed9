"""What a run says: a line for each epoch, a progress bar, pictures. None of it may end the run or lose an epoch."""

import os
import sys
import time

from minires import plots
from minires.console import note, printable, progress_bar, warn

BAR = "{desc} |{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"
SECONDS_BETWEEN_LINES = 30  # where the output is no terminal
BROKEN_PIPE = 13  # the number of SIGPIPE, which Windows has not


def say(line, signals):
    """Print a line. Where nobody reads any more, or the disk of the output is full, the run ends as by a signal.

    Args        signals: the list that `interrupts` gives, or []
    """
    try:
        print(printable(line, sys.stdout), flush=True)
    except OSError as error:
        drop_output()
        signals.append(BROKEN_PIPE)
        if not isinstance(error, BrokenPipeError):
            warn(f"standard output: {error.strerror}; ending after this step")


def output_works():
    try:
        print(end="", flush=True)  # what could not be written is still there to be
    except OSError:
        return False
    return True


def drop_output():
    """Let what is still to be printed go nowhere: it would fail again, at the latest when Python ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


class Progress:
    """A bar on a terminal; elsewhere a line now and then."""

    def __init__(self, title, batches, done, signals):
        self.title, self.batches, self.batch, self.images = title, batches, done, 0
        self.signals = signals
        self.started = self.last_line = time.monotonic()
        self.bar = progress_bar(total=batches, initial=done, desc=title, bar_format=BAR)

    def update(self, images, loss, accuracy, last):
        self.batch += 1
        self.images += images
        now = time.monotonic()
        seconds = max(now - self.started, 1e-3)  # the clock of Windows goes in steps of 16 ms
        text = f"loss {loss:.4f}, accuracy {accuracy:.1%}, {self.images / seconds:.0f} images/s"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()
        if self.bar.disable and not last and now - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = now
            say(f"{self.title}, batch {self.batch}/{self.batches}: {text}", self.signals)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()


def print_row(row, header, signals):
    title = "epoch        lr | train loss  accuracy | valid loss  accuracy |  seconds\n" if header else ""
    validation = f"{'-':>10} {'-':>9} |"
    if row["validation_loss"] is not None:
        validation = f"{row['validation_loss']:10.4f} {row['validation_accuracy']:9.2%} |"
    say(
        f"{title}{row['epoch']:5} {row['lr']:9.2e} | {row['train_loss']:10.4f} {row['train_accuracy']:9.2%} | "
        f"{validation} {row['seconds']:8.1f}",
        signals,
    )


def draw(plot, *args):
    """Draw a picture of minires.plots, where matplotlib is installed; nothing ends for want of a picture.

    Args        plot: the name of the function; args: its arguments, the path last
    """
    try:
        getattr(plots, plot)(*args)
    except Exception as error:  # matplotlib itself, a backend that notebooks ask for, a file that another program holds
        if getattr(error, "name", None) != "matplotlib":
            note(f"no picture {args[-1]}: {error}")
