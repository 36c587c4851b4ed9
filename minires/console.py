"""What is said beside a program's own output, on any console or on none, and commands that can be pasted from it."""

import contextlib
import os
import shlex
import subprocess
import sys
import warnings


def note(line):
    """Print a line to standard error; a process may have none (a service, 2>&-)."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(printable(line, sys.stderr), file=sys.stderr, flush=True)


def warn(line):
    """Warn, and under -W error too only warn: nothing ends for what is said beside it."""
    try:
        warnings.warn(line, stacklevel=3)
    except UserWarning:
        note(f"warning: {line}")


def printable(line, stream):
    """Write what a stream's encoding lacks, such as Chinese names of folders on many consoles, as backslash escapes."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return line.encode(encoding, "backslashreplace").decode(encoding)


def progress_bar(**options):
    """Return tqdm's bar, on standard error; hidden where that is no terminal, and where tqdm cannot be imported.

    A variable such as TQDM_MININTERVAL that is no number makes its import fail.
    """
    try:
        from tqdm import tqdm
    except Exception:
        return HiddenBar()
    hidden = None if sys.stderr else True  # None: where it is no terminal
    return tqdm(**options, leave=False, dynamic_ncols=True, disable=hidden)


class HiddenBar(contextlib.nullcontext):
    """What can be done with a bar, without one."""

    disable = True

    def update(self, *_, **__):
        """Do nothing."""

    set_postfix_str = close = update

    def __enter__(self):
        return self


def command_line(words):
    """Join the words of a command so that it can be pasted into a shell, on Windows into its own."""
    words = [str(word) for word in words]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)
