"""What a run does besides training: its folder, lock and log, data, signals, progress, pictures, errors in one line."""

import contextlib
import csv
import io
import itertools
import json
import os
import pathlib
import platform
import shlex
import shutil
import signal
import sys
import tempfile
import time
import warnings

import numpy as np
from tqdm import tqdm

import minires
from minires import cifar10, plots
from minires.backend import GPUError
from minires.checkpoint import CHECKPOINT, PART, PREVIOUS, CheckpointError, write_atomically

BAR = "{desc} |{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"
SECONDS_BETWEEN_LINES = 30  # where the output is no terminal
PICTURES = 2**20  # bytes, more than the pictures, the log and the settings of a run take together
HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none
BROKEN_PIPE = 13  # the number of SIGPIPE, which Windows has not


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
        try:
            with tempfile.TemporaryFile(dir=out):  # the rights alone do not tell: the disk may be there to be read only
                return out
        except OSError as error:
            raise UsageError(f"--out {out} cannot be written to: {error.strerror}; name another folder") from error
    now = time.strftime("%Y%m%d-%H%M%S")
    for ending in itertools.chain([""], map("-{}".format, itertools.count(2))):
        out = pathlib.Path("runs", now + ending)
        try:
            out.mkdir(parents=True)
            return out
        except FileExistsError as error:
            if not out.exists():  # "runs" is a file
                raise UsageError(
                    f"{out.absolute()} cannot be made: {error.strerror}; name a folder by --out"
                ) from error
        except OSError as error:
            raise UsageError(f"{out.absolute()} cannot be made: {error.strerror}; name a folder by --out") from error


def check_space(folder, checkpoint, weights):
    """Make sure that the disk has room for a run before it begins.

    Three checkpoints are there while one is written: the new one, the one it follows, and the one before.

    Args        folder: of the run, which may not be there yet; checkpoint, weights: bytes of each kind of file
    Raises      UsageError that says how much there is and how much a run takes
    """
    folder = folder.absolute()
    written = [folder / name for name in (CHECKPOINT, PREVIOUS, "best.safetensors")]  # by a run that goes on
    present = sum(path.stat().st_size for path in written if path.exists())
    needed = max(checkpoint, 3 * checkpoint + weights - present) + PICTURES
    place = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UsageError(
            f"the disk of {folder} has {free / 1e6:,.0f} MB free, and the run needs {needed / 1e6:,.0f} MB: "
            "make room, or begin a run on another disk by --out"
        )


def load_data(data, resume=None):
    """Read the sample or a folder with CIFAR-10, which is downloaded where none is named.

    Raises      DataError; for a run that goes on it adds that the data may be elsewhere now
    """
    if data == "sample":
        return cifar10.load_sample()
    try:
        return cifar10.load(data, or_download=True)
    except cifar10.DataError as error:
        if not resume:
            raise
        raise cifar10.DataError(f"{error}; or name its data by --data DIR") from error


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
    """Give a list that gets the number of the first SIGINT, SIGTERM or SIGHUP, for the loop to end at a good place.

    A second one ends the process at once, by the system's own way: nothing of ours runs, and what is on the disk stays.
    But a hangup may come twice, from the terminal and from the shell, and counts once; under nohup it does not count.
    """
    arrived = []

    def on_signal(number, _):
        arrived.append(number)
        for each in before:
            signal.signal(each, signal.SIG_IGN if each == HANGUP else signal.SIG_DFL)
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, b"\nending after this step; Ctrl-C again ends at once, without saving\n")  # print may be busy

    before = {}
    for each in ending_signals():
        before[each] = signal.signal(each, on_signal)
    try:
        yield arrived
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def ending_signals():
    """Return the signals that ask a process to end, without a hangup that nohup has it ignore."""
    heard = HANGUP is not None and signal.getsignal(HANGUP) != signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM] + ([HANGUP] if heard else [])


def say(line, interrupted):
    """Print a line. Where nobody reads any more, or the disk of the output is full, the run ends as by a signal."""
    try:
        print(line, flush=True)
    except OSError as error:
        drop_output()
        interrupted.append(BROKEN_PIPE)
        if not isinstance(error, BrokenPipeError):
            warnings.warn(f"standard output: {error.strerror}; ending after this step", stacklevel=2)


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

    def __init__(self, title, batches, done, interrupted):
        self.title, self.batches, self.batch, self.images = title, batches, done, 0
        self.interrupted = interrupted
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
            say(f"{self.title}, batch {self.batch}/{self.batches}: {text}", self.interrupted)

    def close(self):
        self.bar.close()


def print_row(row, header, interrupted):
    title = "epoch        lr | train loss  accuracy | valid loss  accuracy |  seconds\n" if header else ""
    validation = f"{'-':>10} {'-':>9} |"
    if row["validation_loss"] is not None:
        validation = f"{row['validation_loss']:10.4f} {row['validation_accuracy']:9.2%} |"
    say(
        f"{title}{row['epoch']:5} {row['lr']:9.2e} | {row['train_loss']:10.4f} {row['train_accuracy']:9.2%} | "
        f"{validation} {row['seconds']:8.1f}",
        interrupted,
    )


def best_of(history):
    """Return the row of the epoch whose weights are kept: the lowest validation loss, or the last without any."""
    measured = [row for row in history if row["validation_loss"] is not None]
    return min(measured, key=lambda row: row["validation_loss"]) if measured else history[-1]


def best_row_of(history):
    """Return what best.safetensors says of its epoch: the row without the seconds, which differ from run to run."""
    return {name: value for name, value in best_of(history).items() if name != "seconds"}


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
        line = error.strerror or str(error)
        if not error.filename:
            if isinstance(error, BrokenPipeError):
                return 128 + BROKEN_PIPE, ""
            return 1, line if output_works() else f"standard output: {line}"
        line = f"{error.filename}: {line}"
        folder = pathlib.Path(os.fsdecode(error.filename)).absolute().parent
        if not (folder / "config.json").exists():
            return 1, line
        line += "; what was there before is unharmed. Once the cause is mended, the run goes on with"
        return 1, f"{line} --resume {shlex.quote(str(folder))}"
    if isinstance(error, MemoryError):
        return 1, f"{error}; a run that had begun is in its last checkpoint"
    return 1, f"{type(error).__name__}: {error} (--debug shows the place)"


def run(main):
    """Run the main of an example and end the process with its exit code; an error becomes a line.

    With --debug on the command line it stays a traceback. A pipe that nobody reads any more ends it without a word.
    """
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    code, line = 1, ""
    try:
        try:
            minires.kernels.chosen(), minires.kernels.num_threads()
        except ValueError as error:  # in an environment variable
            raise UsageError(str(error)) from error
        try:
            code = main()
        except SystemExit as end:  # from argparse
            code = end.code
        print(end="", flush=True)  # here an error can still be told
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        code, line = explain(error)
    with contextlib.suppress(OSError):
        if line:
            print(f"error: {line}", file=sys.stderr, flush=True)
    if not output_works():
        drop_output()
    sys.exit(code)
