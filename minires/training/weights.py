"""Trained weights on disk, in PyTorch's names and shapes, and the network that belongs to them.

    save_weights("best.safetensors", model, {"epoch": 3})
    model, metadata = load_model("best.safetensors")

In PyTorch:     model.load_state_dict(safetensors.torch.load_file("best.safetensors"))

The weights that come with minires are such a file too, in float16; ../weights/README.md says where they are from.
"""

import hashlib
import pathlib
import warnings

import numpy as np

from minires import cifar10
from minires.evaluation import predict_logits
from minires.module import UNUSED_IN_PYTORCH_STATE
from minires.resnet import ResNet
from minires.training.storage import CheckpointError, pack, read_arrays, write_atomically

WEIGHTS = "best.safetensors"  # in a run folder
FLOATS = ("float16", "float32", "float64")
PUBLISHED = pathlib.Path(__file__).parent.parent / "weights" / "resnet.safetensors"
PUBLISHED_SHA256 = "fe94370ef6a403b83f015ae8dc44250a0f793b37409d4969ea742a013b13e54e"  # by examples/publish.py


def save_weights(path, model, metadata=None):
    """Write the state of a model, and what else there is to say about it, to a safetensors file.

    Args        model: any Module; metadata: a dict of what JSON can hold
    Raises      OSError that names the file; what was there before is unchanged
    """
    write_state(path, model.state_dict(), (metadata or {}) | metadata_of(model))


def write_state(path, state, metadata):
    """Write a state_dict, which need not be that of a model at hand, as `save_weights` does."""
    write_atomically(path, pack(state, metadata))


def metadata_of(model):
    """Return what the state of a model may not tell: whether a ResNet has shortcuts."""
    return {"shortcut": model.has_shortcut} if isinstance(model, ResNet) else {}


def load_model(path):
    """Build the ResNet whose weights are in a safetensors file, written by `save_weights` or from PyTorch.

    Returns     the model, in evaluation mode, on the CPU; the metadata, {} where there is none
    Raises      CheckpointError for a file that `load_weights` refuses, or that holds another network
    """
    state, metadata = load_weights(path)
    try:
        model = network_of(state, metadata.get("shortcut"))
    except (ValueError, IndexError, ArithmeticError, AttributeError) as error:
        raise CheckpointError(f"{path} holds no network that minires can build: {error}") from error
    return model.eval(), metadata


def load_published():
    """Load the weights that come with minires, as `load_model` does.

    Raises      CheckpointError for a file that is missing or not the one that was published
    """
    try:
        found = hashlib.sha256(PUBLISHED.read_bytes()).hexdigest()
    except OSError as error:
        raise CheckpointError(f"{PUBLISHED} cannot be read: {error.strerror}; install minires anew") from error
    if found != PUBLISHED_SHA256:
        raise CheckpointError(f"{PUBLISHED} has SHA-256 {found}, expected {PUBLISHED_SHA256}: install minires anew")
    return load_model(PUBLISHED)


def load_or_published(path=None):
    """Load the network that a script was given, or else the one that comes with minires, and say so.

    Returns     the model; the path of its weights
    """
    if path is not None:
        return load_model(path)[0], path
    model, metadata = load_published()
    print(f"weights that come with minires: {metadata['test_accuracy']:.2%} of CIFAR-10's test images are right")
    return model, PUBLISHED


def load_weights(path):
    """Read a safetensors file of weights: for `model.load_state_dict`, whatever the model.

    Returns     the state, {name: array}; the metadata, {} where there is none
    Raises      CheckpointError for a file that cannot be read or is damaged, and for numbers of another type than
                float16, float32 or float64, values that are not finite, or a negative variance
    """
    state, metadata = read_arrays(path)
    if "format" in metadata:
        raise CheckpointError(
            f"{path} is a checkpoint, from which a run is resumed: name the weights, {WEIGHTS} in the same folder"
        )
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
    return state, metadata


def network_of(state, shortcut=None):
    """Build the network that a state_dict was taken from, minires's or PyTorch's, with its values.

    Blocks, channels and classes are read from the names and shapes; dropout leaves no trace in a state, so the
    network gets the default. Shortcuts are seen by their projections, if shortcut is None; a network with a single
    stage has none, and counts as residual then.

    Raises      ValueError if this is not the state of a ResNet
    """
    blocks, channels = [], []
    while f"layer{len(blocks) + 1}.0.conv1.weight" in state:
        stage = f"layer{len(blocks) + 1}"
        channels.append(state[f"{stage}.0.conv1.weight"].shape[0])
        blocks.append(sum(name.startswith(f"{stage}.") and name.endswith(".conv1.weight") for name in state))
    if not blocks or "linear.weight" not in state:
        raise ValueError(
            "this is not the state of a minires.ResNet: it has no layer1.0.conv1.weight or no linear.weight, but "
            + (", ".join(list(state)[:5]) or "nothing")
        )
    num_classes = state["linear.weight"].shape[0]
    widths = list(zip(channels, blocks, [channels[0], *channels], strict=False))
    expected = {"conv1.weight": (channels[0], 3, 3, 3), "linear.weight": (num_classes, channels[-1])} | {
        f"layer{i}.{j}.conv{k}.weight": (out, into if j == 0 and k == 1 else out, 3, 3)
        for i, (out, count, into) in enumerate(widths, 1)
        for j in range(count)
        for k in (1, 2)
    }
    for name, shape in expected.items():  # before the network is built: a wrong number could ask for any memory
        if name not in state or state[name].shape != shape or 0 in shape:
            found = f"has shape {state[name].shape}" if name in state else "is missing"
            raise ValueError(f"{name} {found}, expected {shape} and no 0")
    if shortcut is None:
        shortcut = len(blocks) == 1 or any(".shortcut." in name for name in state)
    batch_norm = "bn1.running_mean" in state
    model = ResNet(blocks, channels, num_classes, shortcut=shortcut, batch_norm=batch_norm)
    model.load_state_dict(state)
    return model


def logits_of(model, images, path, tta=False):
    """Run images through a network, whose weights are those at a path.

    Shapes      images (N, 32, 32, 3) uint8  ->  logits (N, 10)
    Raises      CheckpointError for a network that tells other classes apart, or whose numbers run out of range
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # what is not finite is told below, in one line
        logits = predict_logits(model, images, cifar10.MEAN, cifar10.STD, tta=tta)
    if logits.shape[1] != len(cifar10.CLASSES):
        raise CheckpointError(f"{path} tells {logits.shape[1]} classes apart, CIFAR-10 has 10: name another one")
    if not np.isfinite(logits).all():
        wrong = np.count_nonzero(~np.isfinite(logits).all(axis=1))
        raise CheckpointError(
            f"{path} gives logits that are not finite for {wrong:,} of {len(images):,} images: "
            "its weights are too large to compute with, name another one"
        )
    return logits
