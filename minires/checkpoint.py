"""Weights on disk: safetensors files under PyTorch's names and in PyTorch's shapes, so that either side can read them.

    save_weights("best.safetensors", model, {"epoch": 3})
    model, metadata = load_model("best.safetensors")

In PyTorch:     model.load_state_dict(safetensors.torch.load_file("best.safetensors"))

Source      https://github.com/huggingface/safetensors, the format: a JSON header, then the arrays; no code is run
"""

import json
import os
import pathlib

import numpy as np

from minires.resnet import ResNet


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the file and the reason."""


def save_weights(path, model, metadata=None):
    """Write the state of a model, and what else there is to say about it, to a safetensors file.

    The file is complete or not there: it is written beside its place and moved into it at the end.

    Args        metadata: a dict of what JSON can hold
    """
    import safetensors.numpy

    path = pathlib.Path(path)
    metadata = (metadata or {}) | {"shortcut": model.has_shortcut}
    content = safetensors.numpy.save(model.state_dict(), {"minires": json.dumps(metadata)})
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load_model(path):
    """Build the ResNet whose weights are in a safetensors file, written by `save_weights` or from PyTorch.

    Returns     the model, in evaluation mode, on the CPU; the metadata, {} where there is none
    Raises      CheckpointError for a file that cannot be read, is damaged, or holds another network or values that are
                not finite
    """
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
            metadata = json.loads((file.metadata() or {}).get("minires", "{}"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is no safetensors file, or a damaged one: {error}") from error
    except TypeError as error:  # NumPy has no bfloat16
        raise CheckpointError(f"{path} holds numbers that NumPy cannot read ({error}): save it in float32") from error
    for name, array in state.items():
        if not np.isfinite(array).all():
            raise CheckpointError(f"{path}: {name} holds values that are not finite")
    try:
        model = ResNet.from_state_dict(state, metadata.get("shortcut"))
    except (ValueError, IndexError, ArithmeticError, AttributeError) as error:
        raise CheckpointError(f"{path} holds no network that minires can build: {error}") from error
    return model.eval(), metadata
