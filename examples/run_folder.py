"""What a run does besides training: its folder, lock and log, signals, progress, pictures, and errors in one line."""

import contextlib
import csv
import io
import itertools
import json
import os
import pathlib
import platform
import signal
import sys
import time

import numpy as np
from tqdm import tqdm

import minires
from minires import cifar10, plots
from minires.backend import GPUError
from minires.checkpoint import PART, CheckpointError, write_atomically

BAR = "{desc} |{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"
SECONDS_BETWEEN_LINES = 30  # where the output is no terminal


class UsageError(ValueError):
    """What was asked for cannot be done; the message says why, and what can."""


def run_folder(out):
    """Make the run folder, a new one or an empty one: runs/ and the time unless a name is given."""
    if out:
        try:
            out.mkdir(parents=True, exist_ok=True)
            taken = any(path.suffix != PART for path in out.iterdir())
        except FileExistsError:
            taken = True
        except OSError as error:
            raise UsageError(f"--out {out} cannot be made: {error.strerror}; name another folder") from error
        if taken:
            raise UsageError(
                f"--out {out} exists and is not an empty folder: name another, nothing is overwritten "
                f"(--resume {out} goes on with a run)"
            )
        return out
    now = time.strftime("%Y%m%d-%H%M%S")
    for ending in itertools.chain([""], map("-{}".format, itertools.count(2))):
        out = pathlib.Path("runs", now + ending)
        try:
            out.mkdir(parents=True)
            return out
        except FileExistsError:  # another run began in the same second
            continue


@contextlib.contextmanager
def locked(folder):
    """Hold a run folder for this process alone. The lock goes with the process, however that ends."""
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        yield
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UsageError(f"there is no run in {folder}: {error.strerror}") from error
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"{folder} is in use by another process: wait until it ends, or stop it") from None
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def interrupts():
    """Give a list that gets the number of the first SIGINT or SIGTERM, for the loop to end at a good place.

    A second one ends the process at once, by the system's own way: nothing of ours runs, and what is on the disk stays.
    """
    arrived = []

    def on_signal(number, _):
        arrived.append(number)
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        os.write(2, b"\nending after this step; Ctrl-C again ends at once, without saving\n")  # print may be busy

    before = {}
    for each in (signal.SIGINT, signal.SIGTERM):
        before[each] = signal.signal(each, on_signal)
    try:
        yield arrived
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


class Progress:
    """A bar on a terminal; elsewhere a line now and then."""

    def __init__(self, title, batches, done):
        self.title, self.batches, self.batch, self.images = title, batches, done, 0
        self.started = self.last_line = time.monotonic()
        form = {"bar_format": BAR, "leave": False, "disable": None, "dynamic_ncols": True}
        self.bar = tqdm(total=batches, initial=done, desc=title, **form)

    def update(self, images, loss, accuracy, last):
        self.batch += 1
        self.images += images
        now = time.monotonic()
        text = f"loss {loss:.4f}, accuracy {accuracy:.1%}, {self.images / (now - self.started):.0f} images/s"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()
        if self.bar.disable and not last and now - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = now
            print(f"{self.title}, batch {self.batch}/{self.batches}: {text}", flush=True)

    def close(self):
        self.bar.close()


def print_row(row, header):
    if header:
        print("epoch        lr | train loss  accuracy | valid loss  accuracy |  seconds")
    validation = f"{'-':>10} {'-':>9} |"
    if row["validation_loss"] is not None:
        validation = f"{row['validation_loss']:10.4f} {row['validation_accuracy']:9.2%} |"
    print(
        f"{row['epoch']:5} {row['lr']:9.2e} | {row['train_loss']:10.4f} {row['train_accuracy']:9.2%} | "
        f"{validation} {row['seconds']:8.1f}",
        flush=True,
    )


def best_of(history):
    """Return the row of the epoch whose weights are kept: the lowest validation loss, or the last without any."""
    measured = [row for row in history if row["validation_loss"] is not None]
    return min(measured, key=lambda row: row["validation_loss"]) if measured else history[-1]


def write_log(path, history):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, history[0])
    writer.writeheader()
    writer.writerows(history)
    write_atomically(path, text.getvalue().encode())


def write_json(path, content):
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def versions():
    return {
        "minires": minires.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "kernels": minires.kernels.chosen(),
    }


def draw(plot, *args):
    """Draw a picture of minires.plots, where matplotlib is installed; a run does not end for want of a picture."""
    try:
        getattr(plots, plot)(*args)
    except ImportError as error:
        if getattr(error, "name", None) != "matplotlib":
            print(f"no picture {args[-1]}: {error}", file=sys.stderr)


def explain(error):
    """Return the exit code for an error, 2 if the user can mend it by asking otherwise and 1 if not, and a line."""
    if isinstance(error, UsageError | GPUError | cifar10.DataError | CheckpointError):
        return 2, str(error)
    if isinstance(error, FloatingPointError | cifar10.DownloadError):
        return 1, str(error)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        line = f"{where}{error.strerror or error}; what was there before is unharmed"
        return 1, f"{line}. Once the cause is mended, a run that had begun goes on with --resume RUN_FOLDER"
    if isinstance(error, MemoryError):
        return 1, f"{error}; a run that had begun is in its last checkpoint"
    return 1, f"{type(error).__name__}: {error} (--debug shows the place)"
