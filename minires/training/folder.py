"""The folder of a run: made for it alone, locked, with room on its disk; its settings and its log.

config.json              the settings, written when the run begins
log.csv                  a row for each epoch
best.safetensors         the weights that are kept, see weights.py
checkpoint.safetensors   from which the run is resumed, see checkpoint.py; previous.safetensors, the one before
result.json              written when the run has ended
"""

import contextlib
import csv
import io
import itertools
import json
import os
import pathlib
import platform
import shutil
import tempfile
import time

import numpy as np

import minires
from minires.console import command_line
from minires.training.checkpoint import CHECKPOINT, PREVIOUS
from minires.training.storage import PART, to_json, write_atomically
from minires.training.weights import WEIGHTS

SETTINGS, LOG, RESULT = "config.json", "log.csv", "result.json"
SMALL_FILES = 2**20  # bytes, more than the pictures, the log and the settings of a run take together


class UsageError(ValueError):
    """What was asked for cannot be done; the message says why, and what can."""


def new_folder(out, folder_flag=None, resume_flag=None):
    """Make the run folder, a new one or an empty one: runs/ and the time unless a name is given.

    Args        folder_flag, resume_flag: the program's options for such a folder and for one to resume, if it has them
    Raises      UsageError for a folder that cannot be made or written to, or is not empty
    """
    named = f"{folder_flag or 'the run folder'} {out}"
    by_flag = f" by {folder_flag}" if folder_flag else ""
    if out:
        try:
            out.mkdir(parents=True, exist_ok=True)
            taken = any(path.suffix != PART for path in out.iterdir())
        except FileExistsError:
            taken = True
        except OSError as error:
            raise UsageError(f"{named} cannot be made: {error.strerror}; name another folder") from error
        if taken:
            resume = f" ({resume_flag} {command_line([out])} resumes a run)" if resume_flag else ""
            raise UsageError(f"{named} exists and is not an empty folder: name another, nothing is overwritten{resume}")
        try:
            with tempfile.TemporaryFile(dir=out):  # the rights alone do not tell: the disk may be there to be read only
                return out
        except OSError as error:
            raise UsageError(f"{named} cannot be written to: {error.strerror}; name another folder") from error
    now = time.strftime("%Y%m%d-%H%M%S")
    for ending in itertools.chain([""], map("-{}".format, itertools.count(2))):
        out = pathlib.Path("runs", now + ending)
        try:
            out.mkdir(parents=True)
            return out
        except FileExistsError as error:
            if not out.exists():  # "runs" is a file
                raise UsageError(
                    f"{out.absolute()} cannot be made: {error.strerror}; name a folder{by_flag}"
                ) from error
        except OSError as error:
            raise UsageError(f"{out.absolute()} cannot be made: {error.strerror}; name a folder{by_flag}") from error


def check_space(folder, checkpoint, weights, folder_flag=None):
    """Make sure that the disk has room for a run before it begins.

    Three checkpoints are there while one is written: the new one, the one it follows, and the one before.

    Args        folder: of the run, which may not be there yet; checkpoint, weights: bytes of each kind of file;
                folder_flag: see `new_folder`
    Raises      UsageError that says how much there is and how much a run takes
    """
    folder = folder.absolute()
    written = [folder / name for name in (CHECKPOINT, PREVIOUS, WEIGHTS)]  # by a run that is resumed
    present = sum(path.stat().st_size for path in written if os.path.exists(path))
    needed = max(checkpoint, 3 * checkpoint + weights - present) + SMALL_FILES
    place = next((path for path in (folder, *folder.parents) if os.path.exists(path)), None)
    if place is None:  # a drive that is not there: `new_folder` says so
        return
    disk = shutil.disk_usage(place)
    free = disk.free
    if disk.total and free < needed:  # a disk of 0 bytes is a file system that does not tell
        raise UsageError(
            f"the disk of {folder} has {free / 1e6:,.0f} MB free, and the run needs {needed / 1e6:,.0f} MB: "
            f"make room, or begin a run on another disk{f' by {folder_flag}' if folder_flag else ''}"
        )


@contextlib.contextmanager
def locked(folder):
    """Hold a run folder for this process alone, on this machine. The lock goes with the process, however that ends."""
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


def read_settings(folder):
    """Return what config.json says of a run: what it was begun with, and what follows from that.

    Raises      UsageError for a file that cannot be read or is damaged
    """
    path = folder / SETTINGS
    try:
        settings = json.loads(path.read_bytes())
        if not isinstance(settings, dict):
            raise ValueError(f"expected an object, got {str(settings)[:40]}")
        return settings
    except OSError as error:
        raise UsageError(f"there is no run in {folder}, for {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is damaged ({error}): start the run anew in another folder") from error


def write_log(path, history):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, history[0])
    writer.writeheader()
    writer.writerows(history)
    write_atomically(path, text.getvalue().encode())


def write_json(path, content):
    write_atomically(path, (to_json(content, indent=2) + "\n").encode())


def versions():
    return {
        "minires": minires.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "kernels": minires.kernels.chosen(),
    }
