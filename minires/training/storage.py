"""Files that are complete or not there, and arrays in them: safetensors with a checksum.

Source      https://github.com/huggingface/safetensors, the format: a JSON header, then the arrays; no code is run.
            Pillai et al. 2014, "All file systems are not created equal", for what it takes to write a file safely
"""

import contextlib
import errno
import hashlib
import json
import os
import pathlib

import numpy as np

PART = ".minires-part"  # the ending of a file that is being written
NOT_FOR_FOLDERS = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)  # answers of shares that know fsync of files only
HEADER_LIMIT = 2**22  # bytes; that of a checkpoint of the default network has 25,000, and 200 for each epoch


class CheckpointError(ValueError):
    """A file of weights or a checkpoint cannot be used; the message names the file and the reason."""


def write_atomically(path, content, keep=None):
    """Write bytes to a file, so that at every moment the old file or the new one is there, and complete.

    The bytes go to a file beside it. Only when the disk has them does that file take the name, which a file system does
    in one step; then the folder, which holds the name, goes to the disk too. So a crash of the program or of the
    machine leaves at most a file that ends in PART, which nothing reads and `remove_parts` removes.

    Args        keep: the name that the old file gets; without one it is gone
    Raises      OSError that names the file; the old one is there then, under the one name or the other
    """
    path = pathlib.Path(path)
    part = path.with_name(path.name + PART)
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(part, path)
        if os.name == "posix":  # elsewhere a folder cannot be opened
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            except OSError as error:
                if error.errno not in NOT_FOR_FOLDERS:
                    raise
            finally:
                os.close(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def remove_parts(folder):
    """Remove what a run that was killed has left half written in its folder."""
    for part in pathlib.Path(folder).glob(f"*{PART}"):
        part.unlink(missing_ok=True)


def pack(arrays, metadata):
    """Return the bytes of a safetensors file with the arrays, the metadata and a checksum over both."""
    import safetensors.numpy

    text = to_json(metadata)
    arrays = {name: native(array) for name, array in arrays.items()}
    content = safetensors.numpy.save(arrays, {"minires": text, "sha256": _checksum(arrays, text)})
    if int.from_bytes(content[:8], "little") > HEADER_LIMIT:  # `read_arrays` would refuse it
        raise ValueError(
            f"the header of a file can have {HEADER_LIMIT:,} bytes, got metadata of {len(text):,}: keep less there"
        )
    return content


def to_json(content, **options):
    """Write what JSON can hold, NumPy's numbers, single ones, and paths among it."""

    def plain(value):
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        if getattr(value, "ndim", None) == 0:
            return value.item()
        raise TypeError(f"JSON cannot hold a {type(value).__name__}, {str(value)[:40]}: numbers, texts, lists, dicts")

    return json.dumps(content, default=plain, **options)


def native(array):
    """Return an array in the order of axes and of bytes in which safetensors writes it."""
    return np.ascontiguousarray(array, array.dtype.newbyteorder("=")).reshape(array.shape)


def read_arrays(path):
    """Return the arrays and the metadata of a safetensors file, once its checksum is seen to be right.

    A file from elsewhere has neither metadata of minires nor a checksum. One of minires's has both.
    """
    import safetensors

    path = os.fspath(path)  # None fails here, and not as a file of numbers that NumPy has not
    try:
        with open(path, "rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > HEADER_LIMIT:  # believed, it could ask for any amount of memory
            raise CheckpointError(
                f"{path} is no safetensors file, or a damaged one: its header would have {header:,} bytes, "
                f"{HEADER_LIMIT:,} at most are expected"
            )
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
        text = metadata.get("minires", "{}")
        if {"minires", "sha256"} & set(metadata) and metadata.get("sha256") != _checksum(arrays, text):
            raise CheckpointError(f"{path} is damaged: its content does not have the checksum that it was written with")
        metadata = json.loads(text)
        if not isinstance(metadata, dict):
            raise CheckpointError(f"{path} is damaged: its metadata are {text[:40]}, expected a JSON object")
        return arrays, metadata
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror or error}; name a file that is there and may be read"
        ) from error
    except RecursionError as error:
        raise CheckpointError(
            f"{path} is damaged: its metadata are nested too deeply, expected a JSON object"
        ) from error
    except (TypeError, AttributeError) as error:  # NumPy has no bfloat16 and no float8
        raise CheckpointError(f"{path} holds numbers that NumPy cannot read ({error}): save it in float32") from error
    except CheckpointError:
        raise
    except (safetensors.SafetensorError, ValueError) as error:  # ValueError: a shape that no memory could hold
        raise CheckpointError(f"{path} is no safetensors file, or a damaged one: {error}") from error


def _checksum(arrays, text):
    """SHA-256, in hexadecimal, of the metadata and of every array's name, type, shape and bytes."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(json.dumps([name, array.dtype.str, array.shape]).encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return digest.hexdigest()
