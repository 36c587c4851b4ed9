"""Signals that ask a process to end: heard, and left to the loop, which ends at a good moment."""

import contextlib
import os
import signal
import sys
import threading

ENDING = b"\nending after this step; Ctrl-C again ends at once, without saving\n"
HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none


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
        with contextlib.suppress(OSError, ValueError, AttributeError):  # gone, or no file
            if sys.stderr is not None:  # else its number may be that of a file of ours
                os.write(sys.stderr.fileno(), ENDING)  # print may be busy

    before = {}
    in_main_thread = threading.current_thread() is threading.main_thread()
    for each in ending_signals() if in_main_thread else []:  # Python lets no other thread hear signals
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
