"""Checkpoints: all that changes in training, from which a run is resumed to the same bits.

    save_checkpoint(folder, training_state(model, optimizer, average), {"step": 500})
    state, metadata = load_checkpoint(folder)
    restore_training_state(model, optimizer, average, state)

A run folder keeps the newest checkpoint and the one before. Their metadata hold what JSON can say.
"""

import os
import pathlib

import numpy as np

from minires.backend import array_module, to_numpy
from minires.console import warn
from minires.layers import Dropout
from minires.training.storage import CheckpointError, pack, read_arrays, write_atomically

CHECKPOINT, PREVIOUS, DAMAGED = (f"{name}.safetensors" for name in ("checkpoint", "previous", "damaged"))
FORMAT = 1  # goes up when a checkpoint's names change


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
    Raises      FloatingPointError if a number is not finite, since no run can be resumed from there; OSError that names
                the file. Either way the last checkpoint is still there
    """
    for name, array in state.items():
        if not np.isfinite(array).all():
            raise FloatingPointError(f"{name} holds values that are not finite")
    folder = pathlib.Path(folder)
    write_atomically(folder / CHECKPOINT, pack(state, metadata | {"format": FORMAT}), keep=folder / PREVIOUS)


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
            state, metadata = read_arrays(path)
            if "format" not in metadata:
                raise CheckpointError(f"{path} is no checkpoint of a run, or a damaged one: it has no metadata")
        except CheckpointError as error:
            if isinstance(error.__cause__, PermissionError):  # nothing says that this one is damaged
                raise
            problems.append(str(error))
            continue
        if metadata["format"] != FORMAT:
            raise CheckpointError(
                f"{path} has format {metadata['format']}, this minires reads {FORMAT}: use the minires that wrote it"
            )
        if problems:
            kept = ""
            if newest.exists():
                os.replace(newest, folder / DAMAGED)
                kept = f" (kept as {DAMAGED})"
            warn(f"{problems[0]}{kept}; resuming from {path}, the checkpoint before it")
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
