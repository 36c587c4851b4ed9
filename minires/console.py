"""What is said beside a program's own output, on any console or on none: lines, bars, commands that can be pasted."""

import contextlib
import os
import shlex
import subprocess
import sys
import warnings


def note(line):
    """Print a line to standard error; a process may have none (a service, 2>&-), or a closed one."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
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
    """Return a bar of tqdm, which shows only where standard error is a terminal."""
    from tqdm import tqdm

    try:
        shown = sys.stderr.isatty()
    except (AttributeError, ValueError):  # there is none, a closed one, or another object in its place
        shown = False
    return tqdm(disable=not shown, leave=False, dynamic_ncols=True, **options)


def command_line(words):
    """Join the words of a command so that it can be pasted into a shell, on Windows into its own."""
    words = [str(word) for word in words]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)
