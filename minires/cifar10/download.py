"""A large file from the internet: whole and right, or not there.

A download breaks off where networks break, and brings other bytes where a mirror, a proxy or a hotel's login page
stands between. So what has arrived is kept in a part, which the next connection continues, to whatever address; and
only a file with the known size and SHA-256 is handed on.

Source      RFC 9110, HTTP semantics: sections 14 (ranges) and 15 (which answers are worth another try)
"""

import contextlib
import hashlib
import http.client
import itertools
import socket
import time
import urllib.error
import urllib.parse
import urllib.request

from minires.console import note, progress_bar

TIMEOUT = 30.0  # seconds without an answer, to a connection or in the midst of the data
PAUSES = (1, 2, 4)  # seconds before each further round over the addresses: a server that restarts is back by then
SLOWEST = 10_000  # bytes a second; the slowest official server that was measured gives 50,000
BLOCK = 1 << 16
TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}  # the other answers will be the same in a second


class DownloadError(RuntimeError):
    """A download failed, for reasons outside the program; the message names them and the way to do it by hand."""


class _Failed(Exception):  # noqa: N818  (it is no error yet: there may be another try, or another address)
    def __init__(self, reason, again=True):
        super().__init__(reason)
        self.again = again  # whether asking this address once more can help


def fetch(urls, part, size, sha256, *, timeout=TIMEOUT, pauses=PAUSES, slowest=SLOWEST):
    """Download a file from the first of several addresses that has it. Each continues what the others have brought.

    An address that fails gives way to the next one at once; after the last, those that may recover are asked again,
    after a pause that grows.

    Args        urls: the best first; part: the path of the unfinished file, its name and ".part"; size: in bytes
                timeout: seconds; pauses: seconds before each further round; slowest: bytes a second, over `timeout`
    Returns     the part, complete and verified: the caller moves or deletes it
    Raises      DownloadError with a reason for each address; OSError for the disk
    """
    faults, left = {}, list(urls)
    for pause in (0, *pauses):
        time.sleep(pause)
        for url in left:
            try:
                return _fetch_from(url, part, size, sha256, timeout, slowest)
            except _Failed as fault:
                faults[url] = fault
        left = [url for url in left if faults[url].again]
        if not left:
            break
    raise DownloadError("; ".join(f"{_host(url)}: {fault}" for url, fault in faults.items()))


def _fetch_from(url, part, size, sha256, timeout, slowest):
    """Complete the part from one address, for as long as each connection brings at least a hundredth of the file."""
    foreign = _size(part) > 0  # what is there may be another address's
    while True:
        before = _size(part)
        try:
            if before < size:
                _continue(url, part, size, timeout, slowest)
        except _Failed as fault:
            if not fault.again or _size(part) - before < size / 100:
                raise
            continue
        if hashlib.sha256(part.read_bytes()).hexdigest() == sha256:
            return part
        part.unlink()
        if not foreign:  # every byte of it came from here
            raise _Failed(f"sent {size:,} bytes with a wrong SHA-256", again=False)
        foreign = False  # once more, from the first byte


def _continue(url, part, size, timeout, slowest):
    """Append to the part what is missing, in one connection. An OSError is always the disk's."""
    have = _size(part)
    headers = {"User-Agent": "minires", "Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with _network(timeout):
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)
    with response:
        end = have if response.status == 206 else 0  # a server that knows no ranges begins at the first byte
        if response.length is not None and end + response.length != size:
            raise _Failed(f"offers {end + response.length:,} bytes, expected {size:,}", again=False)
        rest = f", the rest after {have / 1e6:.1f} MB" if have else ""
        note(f"downloading {part.stem}, {size / 1e6:.1f} MB, from {_host(url)}{rest}")
        with open(part, "ab") as file, progress_bar(total=size, initial=end, unit="B", unit_scale=True) as bar:
            checked, since = end, time.monotonic()
            while end < size:
                with _network(timeout):
                    block = response.read1(min(BLOCK, size - end))
                if not block:
                    raise _Failed(f"ended the connection after {end:,} of {size:,} bytes")
                file.write(block[max(0, have - end) :])  # what is there already is passed over
                end += len(block)
                bar.update(len(block))
                seconds = time.monotonic() - since
                if seconds > timeout:
                    if end - checked < slowest * seconds:
                        raise _Failed(f"sends only {(end - checked) / seconds:,.0f} bytes a second")
                    checked, since = end, time.monotonic()


@contextlib.contextmanager
def _network(timeout):
    """Turn whatever goes wrong between here and a server into _Failed, with the reason in one line."""
    try:
        yield
    except urllib.error.HTTPError as error:
        error.close()
        answer = f"HTTP {error.code} {http.client.responses.get(error.code, '')}".strip()
        raise _Failed(answer, again=error.code in TRY_AGAIN) from None
    except (OSError, http.client.HTTPException, ValueError) as error:  # a ValueError is about the address
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        reason = " ".join(str(getattr(cause, "strerror", None) or cause or type(cause).__name__).split())
        if isinstance(cause, TimeoutError):
            reason = f"no answer within {timeout:g} s"
        elif isinstance(cause, socket.gaierror):
            reason = "the name cannot be looked up"
        raise _Failed(reason) from None


@contextlib.contextmanager
def lock(path):
    """Keep other processes out until the block ends; wait for one that is in.

    The operating system holds the lock for as long as the process lives, so a killed one leaves none behind. The empty
    file stays: whoever deletes a lock file can delete the one that another process has just taken. Where a file system
    has no locks, nobody is kept out.
    """
    with open(path, "ab") as file:
        for attempt in itertools.count():
            try:
                _take(file)
                break
            except (BlockingIOError, PermissionError):  # what Linux and macOS, and what Windows, call a taken lock
                if attempt == 0:
                    note(f"another process is at work in {path.parent}; waiting for it")
                time.sleep(0.1)
            except OSError:  # a file system without locks
                break
        yield


def _take(file):
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _size(part):
    return part.stat().st_size if part.exists() else 0


def _host(url):
    return urllib.parse.urlsplit(url).hostname or url
