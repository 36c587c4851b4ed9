"""What every script needs around its main: errors in one line, exit codes, an output that may be gone."""

import contextlib
import errno
import os
import pathlib
import signal
import sys
import warnings

from minires import cifar10, kernels
from minires.backend import GPUError, memory_shortage
from minires.console import command_line, note
from minires.training.distributed import OneProcess, RanksDifferError
from minires.training.folder import RESULT, SETTINGS, UsageError
from minires.training.launch import leave
from minires.training.output import BROKEN_PIPE, drop_output, output_works
from minires.training.storage import CheckpointError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def explain(error):
    """Return the exit code for an error, 2 if the user can mend it by asking otherwise and 1 if not, and a line."""
    if isinstance(error, UsageError | GPUError | cifar10.DataError | CheckpointError):
        return 2, str(error)
    if isinstance(error, FloatingPointError | cifar10.DownloadError | RanksDifferError):
        return 1, str(error)
    if isinstance(error, OSError):
        line = error.strerror or str(error)
        if not error.filename:
            if isinstance(error, BrokenPipeError):
                return 128 + BROKEN_PIPE, ""
            to_output = error.errno in DISK_FULL or not output_works()  # all else that is written has a name
            return 1, f"standard output: {line}" if to_output else line
        line = f"{error.filename}: {line}"
        folder = pathlib.Path(os.fsdecode(error.filename)).absolute().parent
        if not os.path.exists(folder / SETTINGS) or os.path.exists(folder / RESULT):  # no run, or one that has ended
            return 1, line
        line += "; what was there before is unharmed. Once the cause is mended, resume the run by"
        return 1, f"{line} --resume {command_line([str(folder)])}"
    if isinstance(error, MemoryError):
        return 1, f"out of memory: {memory_shortage(error)}"
    return 1, f"{type(error).__name__}: {error} (--debug shows the place)"


def run_script(main, ranks=OneProcess):
    """Run the main of an example and end the process with its exit code; an error becomes a line.

    With --debug on the command line it stays a traceback. A pipe that nobody reads any more ends it without a word.

    Args        ranks: a function that returns the processes that run the script together, see distributed.py
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names that the encoding lacks are printed with backslashes
            stream.reconfigure(errors="backslashreplace")
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    code, line, together = 1, "", OneProcess()
    try:
        together = ranks()
        try:
            kernels.chosen(), kernels.num_threads()
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
    line = leave(together, code, line)
    with contextlib.suppress(OSError):
        if line:
            note(f"error: {line}")
    if not output_works():
        drop_output()
    sys.exit(code)
