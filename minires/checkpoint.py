"""What a run writes to disk, and how it comes back: trained weights, and checkpoints from which a run goes on.

    save_weights("best.safetensors", model, {"epoch": 3})               for PyTorch as well
    model, metadata = load_model("best.safetensors")

    save_checkpoint(folder, training_state(model, optimizer, average), {"step": 500})
    state, metadata = load_checkpoint(folder)
    restore_training_state(model, optimizer, average, state)

In PyTorch:     model.load_state_dict(safetensors.torch.load_file("best.safetensors"))

Both kinds are safetensors files. Their metadata hold what JSON can say, and a SHA-256 of all the content. A file is
complete or not there: `write_atomically` tells how. A run folder keeps the newest checkpoint and the one before.

Source      https://github.com/huggingface/safetensors, the format: a JSON header, then the arrays; no code is run.
            Pillai et al. 2014, "All file systems are not created equal", for what it takes to write a file safely
"""

import contextlib
import hashlib
import json
import os
import pathlib
import warnings

import numpy as np

from minires.backend import array_module, to_numpy
from minires.layers import Dropout
from minires.module import UNUSED_IN_PYTORCH_STATE
from minires.resnet import ResNet

CHECKPOINT, PREVIOUS, DAMAGED = (f"{name}.safetensors" for name in ("checkpoint", "previous", "damaged"))
PART = ".minires-part"  # the ending of a file that is being written
FORMAT = 1  # goes up when a checkpoint's names change
FLOATS = ("float16", "float32", "float64")
HEADER_LIMIT = 2**22  # bytes; that of a checkpoint of the default network has 25,000, and 200 for each epoch


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the file and the reason."""


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


def save_weights(path, model, metadata=None):
    """Write the state of a model, and what else there is to say about it, to a safetensors file.

    Args        metadata: a dict of what JSON can hold
    Raises      OSError that names the file; what was there before is unchanged
    """
    write_atomically(path, _pack(model.state_dict(), (metadata or {}) | {"shortcut": model.has_shortcut}))


def load_model(path):
    """Build the ResNet whose weights are in a safetensors file, written by `save_weights` or from PyTorch.

    Returns     the model, in evaluation mode, on the CPU; the metadata, {} where there is none
    Raises      CheckpointError for a file that cannot be read, is damaged, or holds another network, numbers of another
                type than float16, float32 or float64, values that are not finite, or a negative variance
    """
    state, metadata = _read(path)
    for name, array in state.items():
        last = name.rpartition(".")[2]
        if array.dtype.name not in FLOATS and not (last == UNUSED_IN_PYTORCH_STATE and array.dtype.kind in "iu"):
            raise CheckpointError(
                f"{path}: {name} holds numbers of type {array.dtype}, expected one of {', '.join(FLOATS)}: "
                "save the weights as they were trained"
            )
        if not np.isfinite(array).all():
            raise CheckpointError(f"{path}: {name} holds values that are not finite: save weights from before that")
        if last == "running_var" and (array < 0).any():
            raise CheckpointError(
                f"{path}: {name} holds {array.min():.4g}, and a variance is at least 0: save the weights as they were "
                "trained"
            )
    try:
        model = ResNet.from_state_dict(state, metadata.get("shortcut"))
    except (ValueError, IndexError, ArithmeticError, AttributeError) as error:
        raise CheckpointError(f"{path} holds no network that minires can build: {error}") from error
    return model.eval(), metadata


def training_state(model, optimizer, average=None):
    """Return all that changes in training, as host arrays by name.

    These are the weights, the running statistics, what the optimizer and a WeightAverage keep, and the counts of what
    they and each Dropout have done; random numbers need no more than the counts.
    """
    state = {f"model.{name}": array for name, array in model.state_dict().items()}
    state |= {name: to_numpy(array) for name, array in _kept_arrays(model, optimizer, average).items()}
    return state | {
        name: np.asarray(int(vars(owner)[count])) for name, owner, count in _counts(model, optimizer, average)
    }


def restore_training_state(model, optimizer, average, state):
    """Put what `training_state` has returned back, in place, into what is built alike.

    The device does not matter: a state from the CPU goes into a model on the GPU, and the other way round.

    Args        state: may hold other names too, which are left alone
    Raises      CheckpointError that lists what is missing or of the wrong shape
    """
    arrays, counts = _kept_arrays(model, optimizer, average), _counts(model, optimizer, average)
    expected = {name: tuple(array.shape) for name, array in arrays.items()} | {name: () for name, _, _ in counts}
    errors = [f"missing {name}" for name in expected if name not in state]
    errors += [
        f"{name} has shape {state[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if name in state and state[name].shape != shape
    ]
    if errors:
        raise CheckpointError(
            f"the checkpoint does not fit this optimizer and network: {'; '.join(errors)}. Build them as it was saved"
        )
    try:
        model.load_state_dict(part_of(state, "model."))
    except ValueError as error:
        raise CheckpointError(f"the checkpoint does not fit this network: {error}. Build it as it was saved") from error
    for name, array in arrays.items():
        array[...] = array_module(array).asarray(state[name])
    for name, owner, count in counts:
        setattr(owner, count, int(state[name]))


def part_of(state, prefix):
    """Return what begins with the prefix, without it."""
    return {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}


def save_checkpoint(folder, state, metadata):
    """Write a checkpoint into a run folder; the one there was before is kept as the previous one.

    Args        state: a dict of host arrays; metadata: a dict of what JSON can hold
    Raises      FloatingPointError if a number is not finite, since nothing can go on from there; OSError that names the
                file. Either way the last checkpoint is still there
    """
    for name, array in state.items():
        if not np.isfinite(array).all():
            raise FloatingPointError(f"{name} holds values that are not finite")
    folder = pathlib.Path(folder)
    write_atomically(folder / CHECKPOINT, _pack(state, metadata | {"format": FORMAT}), keep=folder / PREVIOUS)


def load_checkpoint(folder):
    """Read the newest checkpoint of a run folder, or the previous one, with a warning, where the newest is damaged.

    A damaged one is renamed, so that the next checkpoint does not push out the good one.

    Returns     the arrays and the metadata; None if the run has not come as far as a checkpoint
    Raises      CheckpointError if there are checkpoints and none can be used
    """
    folder, problems = pathlib.Path(folder), []
    newest, previous = folder / CHECKPOINT, folder / PREVIOUS
    if not newest.exists() and not previous.exists():
        return None
    for path in (newest, previous):
        try:
            state, metadata = _read(path)
            if "format" not in metadata:
                raise CheckpointError(f"{path} is no checkpoint of a run, or a damaged one: it has no metadata")
        except CheckpointError as error:
            if isinstance(error.__cause__, PermissionError):  # nothing says that this one is damaged
                raise
            problems.append(str(error))
            continue
        if metadata["format"] != FORMAT:
            raise CheckpointError(
                f"{path} has format {metadata['format']}, this minires reads {FORMAT}: use the other one"
            )
        if problems:
            kept = ""
            if newest.exists():
                os.replace(newest, folder / DAMAGED)
                kept = f" (kept as {DAMAGED})"
            warnings.warn(f"{problems[0]}{kept}; going on from {path}, the checkpoint before it", stacklevel=2)
        return state, metadata
    raise CheckpointError(
        f"no checkpoint in {folder} can be used: {'; '.join(problems)}. Bring one back from a copy, or start the run "
        "anew in another folder"
    )


def _kept_arrays(model, optimizer, average):
    """What is kept beside the parameters, as views: {optimizer.m.conv1.weight: array, ...}."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    owners = {"optimizer": optimizer} | ({"average": average} if average else {})
    return {
        f"{owner}.{kind}.{names[id(parameter)]}": array
        for owner, keeper in owners.items()
        for kind, arrays in keeper.state().items()
        for parameter, array in zip(optimizer.params, arrays, strict=True)
    }


def _counts(model, optimizer, average):
    """The counts from which random numbers, Adam's corrections and the average's decay follow."""
    counts = [(f"steps.{name}", part, "step") for name, part in model.named_modules() if isinstance(part, Dropout)]
    counts += [("steps.optimizer", optimizer, "steps")] if hasattr(optimizer, "steps") else []
    return counts + ([("updates.average", average, "updates")] if average else [])


def _pack(arrays, metadata):
    """Return the bytes of a safetensors file with the arrays, the metadata and a checksum over both."""
    import safetensors.numpy

    text = json.dumps(metadata)
    content = safetensors.numpy.save(arrays, {"minires": text, "sha256": _checksum(arrays, text)})
    if int.from_bytes(content[:8], "little") > HEADER_LIMIT:  # `_read` would refuse it
        raise ValueError(f"the header of a file can have {HEADER_LIMIT:,} bytes, got metadata of {len(text):,}")
    return content


def _read(path):
    """Return the arrays and the metadata of a safetensors file, once its checksum is seen to be right.

    A file from elsewhere has neither metadata of minires nor a checksum. One of minires's has both.
    """
    import safetensors

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
    except TypeError as error:  # NumPy has no bfloat16
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
