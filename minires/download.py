"""A large file from the internet: whole and right, or not there.

A download breaks off where networks break, and comes back with the wrong bytes where a mirror, a proxy or a hotel's
login page stands between. So what has arrived is kept beside its place and continued, several addresses are tried in
turn, and only a file with the known size and SHA-256 is handed on.

Source      RFC 9110, HTTP semantics: sections 14 (ranges) and 15 (which answers are worth another try)
"""

import contextlib
import hashlib
import http.client
import itertools
import os
import socket
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import NamedTuple

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


class _Interrupted(Exception):  # noqa: N818  (it is no error yet: there may be another try)
    """The transfer ended early; going on with it later can help."""


class _Useless(Exception):  # noqa: N818
    """This address has not got the file; asking it again is in vain."""


def fetch(sources, folder, *, timeout=TIMEOUT, pauses=PAUSES, slowest=SLOWEST):
    """Download one file from the first of several addresses that has it.

    Addresses of the same file go on with each other's work: they share one `name.part`. An address that sends nothing
    but the whole file writes beside it, until it has brought more than is there. An address that fails gives way to the
    next one at once; after the last, those that may recover are asked again, after a pause that grows.

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
            except _Useless as fault:
                left.remove(source)
                faults[source.url] = fault
            except _Interrupted as fault:
                faults[source.url] = fault
        if not left:
            break
    raise DownloadError("; ".join(f"{_host(url)}: {fault}" for url, fault in faults.items()))


def parts(name, folder):
    """Return the paths under which an unfinished file is kept: the part, and the second one, begun from byte 0."""
    return folder / f"{name}.part", folder / f"{name}.second.part"


def _fetch_from(source, folder, timeout, slowest):
    """Bring the file from one address, continuing for as long as each connection brings at least a hundredth of it."""
    part, second = parts(source.name, folder)
    _keep_the_longer(part, second)  # a killed process leaves both
    foreign = _size(part) > 0  # what is there may be another address's
    for attempt in itertools.count():
        before = _size(part)
        try:
            whole = _transfer(source, part, second, timeout, slowest, announce=attempt == 0)
        except BaseException as end:  # Ctrl-C and a full disk as well
            _keep_the_longer(part, second)
            if not isinstance(end, _Interrupted) or _size(part) - before < source.size / 100:
                raise
            continue
        if sha256_of(whole) == source.sha256:
            if whole == second:
                os.replace(second, part)
            return part
        whole.unlink()
        if whole == second or not foreign:  # every byte of it came from here
            raise _Useless(f"sent {source.size:,} bytes with a wrong SHA-256")
        foreign = False  # once more, from the first byte


def _keep_the_longer(part, second):
    """Leave one of the two, as the part: which of them is right is not known, but more has come of the longer."""
    if _size(second) > _size(part):
        os.replace(second, part)
    second.unlink(missing_ok=True)


def _transfer(source, part, second, timeout, slowest, announce):
    """Append to the part what is missing, or bring the whole into the second file, in one connection.

    Returns     the path of the one that is complete
    Raises      _Interrupted, _Useless; OSError is always the disk's
    """
    from tqdm import tqdm

    have = _size(part)
    if have > source.size:
        have = 0
    if have == source.size:
        return part
    path = part
    with _open(source.url, have, timeout) as response:
        if response.status != 206 or not have:  # the whole file: the server knows no ranges, or was not asked for one
            path, have = (second if have else part), 0
        elif not (response.headers.get("Content-Range") or "").startswith(f"bytes {have}-"):
            raise _Useless(f"answers with another range than the one from byte {have:,}")
        if response.length is not None and have + response.length != source.size:
            raise _Useless(f"offers {have + response.length:,} bytes, expected {source.size:,}")
        if announce:
            rest = f", the rest after {have / 1e6:.1f} MB" if have else ""
            say(f"downloading {source.name}, {source.size / 1e6:.1f} MB, from {_host(source.url)}{rest}")
        bar = tqdm(
            total=source.size, initial=have, unit="B", unit_scale=True, leave=False, disable=None, dynamic_ncols=True
        )
        with open(path, "ab" if have else "wb") as file, bar:
            begun = have
            since, since_when = 0, time.monotonic()
            while block := _read(response, timeout):
                have += len(block)
                if have > source.size:
                    file.truncate(begun)  # what other connections have brought is not in doubt
                    raise _Useless(f"sends more than the expected {source.size:,} bytes")
                file.write(block)
                bar.update(len(block))
                since += len(block)
                seconds = time.monotonic() - since_when
                if seconds > timeout:
                    if since < slowest * seconds:
                        raise _Interrupted(f"sends only {since / seconds:,.0f} bytes a second")
                    since, since_when = 0, time.monotonic()
            file.flush()
            os.fsync(file.fileno())
    if have < source.size:
        raise _Interrupted(f"ended the connection after {have:,} of {source.size:,} bytes")
    return path


def _open(url, start, timeout):
    headers = {"User-Agent": "minires", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        answer = f"HTTP {error.code} {http.client.responses.get(error.code, '')}".strip()
        raise (_Interrupted if error.code in TRY_AGAIN else _Useless)(answer) from None
    except (OSError, http.client.HTTPException) as error:
        raise _Interrupted(_reason(error, timeout)) from None
    except ValueError as error:
        raise _Useless(f"is no address that can be opened: {error}") from None


def _read(response, timeout):
    """Return the bytes that have come, at least one, or none at the end."""
    try:
        return response.read1(BLOCK)
    except (OSError, http.client.HTTPException) as error:
        raise _Interrupted(_reason(error, timeout)) from None


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
        try:
            _take(file, wait=False)
        except (BlockingIOError, PermissionError):  # what Linux and macOS, and what Windows, call a lock that is taken
            say(f"another process is at work in {path.parent}; waiting for it")
            _take(file, wait=True)
        yield


def _take(file, wait):
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        while True:
            try:
                return msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            except PermissionError:
                if not wait:
                    raise
                time.sleep(1)
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def sha256_of(path):
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def say(text):
    """Tell the user what goes on, beside the program's own output."""
    print(text, file=sys.stderr, flush=True)


def _size(path):
    return path.stat().st_size if path.exists() else 0


def _host(url):
    return urllib.parse.urlsplit(url).hostname or url
