"""A large file from the internet: whole and right, or not there.

A download breaks off where networks break, and comes back with the wrong bytes where a mirror, a proxy or a hotel's
login page stands between. So what has arrived is kept beside its place and continued, several addresses are tried in
turn, and only a file with the known size and SHA-256 is handed on.

Source      RFC 9110, HTTP semantics: sections 14 (ranges) and 15 (which answers are worth another try)
"""

import contextlib
import functools
import hashlib
import http.client
import os
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import NamedTuple

from minires.console import note, progress_bar

TIMEOUT = 30.0  # seconds without an answer, to a connection or in the midst of the data
PAUSES = (1, 2, 4)  # seconds before each further round over the addresses: a server that restarts is back by then
SLOWEST = 10_000  # bytes a second; the slowest official server that was measured gives 50,000
BLOCK = 1 << 16
TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}  # the other answers will be the same in a second


class DownloadError(RuntimeError):
    """A download failed, for reasons outside the program; the message names them and the way to do it by hand."""


class Source(NamedTuple):
    """An address, and what is known of the file there: its name, its bytes, its SHA-256 in hexadecimal."""

    url: str
    name: str
    size: int
    sha256: str


class _Failed(Exception):  # noqa: N818  (it is no error yet: there may be another try, or another address)
    def __init__(self, reason, again=True):
        super().__init__(reason)
        self.again = again  # whether asking this address once more can help


def fetch(sources, folder, *, timeout=TIMEOUT, pauses=PAUSES, slowest=SLOWEST):
    """Download one file from the first of several addresses that has it.

    Addresses of the same file continue each other's work: they share one `name.part`. An address that fails gives way
    to the next one at once; after the last, those that may recover are asked again, after a pause that grows.

    Args        sources: a list of Source, the best first; folder: where the parts are kept
                timeout: seconds; pauses: seconds before each further round; slowest: bytes a second, over `timeout`
    Returns     the path of the complete and verified file, still called `name.part`: the caller moves or deletes it
    Raises      DownloadError with a reason for each address; OSError for the disk
    """
    faults, left = {}, list(sources)
    for pause in (0, *pauses):
        time.sleep(pause)
        for source in list(left):
            try:
                return _fetch_from(source, folder, timeout, slowest)
            except _Failed as fault:
                faults[source.url] = fault
                if not fault.again:
                    left.remove(source)
        if not left:
            break
    raise DownloadError("; ".join(f"{_host(url)}: {fault}" for url, fault in faults.items()))


def _fetch_from(source, folder, timeout, slowest):
    """Bring the file from one address, continuing for as long as each connection brings at least a hundredth of it."""
    part = folder / f"{source.name}.part"
    foreign = _size(part) > 0  # what is there may be another address's
    announce = True
    while True:
        before = _size(part)
        if before < source.size:
            try:
                _continue(source, part, timeout, slowest, announce)
            except _Failed as fault:
                if not fault.again or _size(part) - before < source.size / 100:
                    if not _size(part):
                        part.unlink(missing_ok=True)
                    raise
                announce = False
                continue
        if _size(part) == source.size and sha256_of(part) == source.sha256:
            return part
        part.unlink()
        if not foreign:  # every byte of it came from here
            raise _Failed(f"sent {source.size:,} bytes with a wrong SHA-256", again=False)
        foreign = False  # once more, from the first byte


def _continue(source, part, timeout, slowest, announce):
    """Append to the part what is missing, in one connection. OSError is always the disk's."""
    have = _size(part)
    rest = f", the rest after {have / 1e6:.1f} MB" if have else ""
    bar = progress_bar(total=source.size, initial=have, unit="B", unit_scale=True)
    with open(part, "ab") as file, bar as progress:
        slow_since, end_then = time.monotonic(), None
        for end, block in _blocks(source, have, timeout):
            if announce:
                note(f"downloading {source.name}, {source.size / 1e6:.1f} MB, from {_host(source.url)}{rest}")
                announce = False
            if end > source.size:
                file.truncate(have)  # what other connections have brought is not in doubt
                raise _Failed(f"sends more than the expected {source.size:,} bytes", again=False)
            missing = end - max(have, end - len(block))
            if missing > 0:
                file.write(block[-missing:])
                progress.update(missing)
            end_then = end - len(block) if end_then is None else end_then
            seconds = time.monotonic() - slow_since
            if seconds > timeout:
                if end - end_then < slowest * seconds:
                    raise _Failed(f"sends only {(end - end_then) / seconds:,.0f} bytes a second")
                slow_since, end_then = time.monotonic(), end
        file.flush()
        os.fsync(file.fileno())


def _blocks(source, have, timeout):
    """Yield (where a block ends in the file, the block) of what a server sends: the rest, or all if it knows no ranges.

    Whatever goes wrong on the way becomes _Failed.
    """
    headers = {"User-Agent": "minires", "Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(urllib.request.Request(source.url, headers=headers), timeout=timeout) as response:
            end = have if response.status == 206 else 0
            if end and not (response.headers.get("Content-Range") or "").startswith(f"bytes {have}-"):
                raise _Failed(f"answers with another range than the one from byte {have:,}", again=False)
            if response.length is not None and end + response.length != source.size:
                raise _Failed(f"offers {end + response.length:,} bytes, expected {source.size:,}", again=False)
            while block := response.read1(BLOCK):
                end += len(block)
                yield end, block
    except urllib.error.HTTPError as error:
        error.close()
        answer = f"HTTP {error.code} {http.client.responses.get(error.code, '')}".strip()
        raise _Failed(answer, again=error.code in TRY_AGAIN) from None
    except (OSError, http.client.HTTPException) as error:
        raise _Failed(_reason(error, timeout)) from None
    except ValueError as error:
        raise _Failed(f"is no address that can be opened: {error}", again=False) from None
    if end < source.size:
        raise _Failed(f"ended the connection after {end:,} of {source.size:,} bytes")


def _reason(error, timeout):
    error = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(error, TimeoutError):
        return f"no answer within {timeout:g} s"
    if isinstance(error, socket.gaierror):
        return "the name cannot be looked up"
    return " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())


@contextlib.contextmanager
def lock(path):
    """Keep other processes out until the block ends; wait for one that is in.

    The operating system holds the lock for as long as the process lives, so a killed one leaves none behind. The empty
    file stays: whoever deletes a lock file can delete the one that another process has just taken.
    """
    with open(path, "ab") as file:
        waits = False
        while not _take(file):
            if not waits:
                note(f"another process is at work in {path.parent}; waiting for it")
            waits = True
            time.sleep(0.1)
        yield


def _take(file):
    """Return whether the lock on a file could be taken."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        take = functools.partial(msvcrt.locking, file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        take = functools.partial(fcntl.flock, file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        take()
    except (BlockingIOError, PermissionError):  # what Linux and macOS, and what Windows, call a lock that is taken
        return False
    return True


def sha256_of(path):
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _size(path):
    return path.stat().st_size if path.exists() else 0


def _host(url):
    return urllib.parse.urlsplit(url).hostname or url
