"""What can be asked of train_cifar.py: the recipes, their ingredients, and the flags of a run that is resumed."""

import argparse

import minires
from minires import kernels
from minires.backend import gpu_library
from minires.console import note
from minires.kernels import gpu
from minires.training import UsageError
from minires.training.arguments import at_least, data_folder, folder, not_negative, positive, probability
from minires.training.folder import SETTINGS

SCHEDULES = {
    "constant": minires.constant,
    "cosine": minires.cosine,
    "one-cycle": minires.one_cycle,
    "triangular": minires.triangular,
}
FLIPS = ("none", "random", "alternating")
PRECISIONS = {"float32": "float32", "tf32": "float32", "fp16": "float16"}  # and the type of the images
LOSS_SCALE = 1024.0  # with fp16: small gradients stay above 0, and the largest far below the limit of 65,504
RECIPES = {
    "report": {  # Shamooun, Deshmukh and Alamuru, "Residual Network Design"
        "epochs": 20,
        "batch_size": 128,
        "optimizer": "adam",
        "lr": 1e-3,
        "schedule": "constant",
        "momentum": 0.9,
        "nesterov": True,
        "bias_lr": 1.0,
        "filter_lr": 0.25,
        "weight_decay": 0.0,
        "decay_vectors": True,
        "clip": None,
        "label_smoothing": 0.0,
        "dropout": 0.5,
        "crop": 4,
        "flip": "random",
        "cutout": 0,
        "trivial_augment": False,
        "early_size": 0,
        "ema": 0.0,
        "tta": False,
        "full_train": False,
    },
    "hour": {
        # For two CPU cores. Jordan et al. 2024: Muon. Page 2018, "How to train your ResNet": faster biases, smoothing
        # of 0.2, weight decay. Howard 2018, for DAWNBench: small images first (progressive resizing). The average is
        # over about 500 steps. The ingredients were chosen by validation accuracy, see RESULTS.md.
        "epochs": 16,
        "optimizer": "muon",
        "lr": 0.2,
        "schedule": "triangular",
        "bias_lr": 8.0,
        "weight_decay": 5e-4,
        "decay_vectors": False,
        "label_smoothing": 0.2,
        "dropout": 0.0,
        "crop": 2,
        "flip": "alternating",
        "early_size": 24,
        "ema": 0.998,
        "tta": True,
        "full_train": True,
    },
    "fast": {
        # Page 2018, "How to train your ResNet": the weight decay, the shape of the schedule, cutout of 8. He et al.
        # 2019, "Bag of tricks": smoothing, no decay on vectors. Jordan 2024, "94% on CIFAR-10 in 3.29 seconds":
        # alternating flip, mirrored test images. The average is over about half an epoch. The rate is twice Page's for
        # a batch of this size; by validation accuracy, one seed each: 93.86 %, and 93.62 % without cutout.
        "epochs": 30,
        "optimizer": "sgd",
        "lr": 0.2,
        "schedule": "triangular",
        "weight_decay": 5e-4,
        "decay_vectors": False,
        "label_smoothing": 0.1,
        "dropout": 0.0,
        "flip": "alternating",
        "cutout": 8,
        "ema": 0.995,
        "tta": True,
        "full_train": True,
    },
    "best": {
        # Müller and Hutter 2021, "TrivialAugment": optimizer, rate (0.1 for batches of 128), weight decay, schedule,
        # epochs, augmentation (random flip) with cutout of 16. Smoothing, vectors and mirrored test images as in fast;
        # the average is over about five epochs.
        "epochs": 200,
        "batch_size": 256,
        "optimizer": "sgd",
        "lr": 0.2,
        "schedule": "cosine",
        "weight_decay": 5e-4,
        "decay_vectors": False,
        "label_smoothing": 0.1,
        "dropout": 0.0,
        "cutout": 16,
        "trivial_augment": True,
        "ema": 0.999,
        "tta": True,
        "full_train": True,
    },
}
NO_AUGMENT = {"crop": 0, "flip": "none", "cutout": 0, "trivial_augment": False}
MAY_BE_NONE = ("precision", "data", "limit_batches", "clip")
FREE_IN_A_RESUMED_RUN = (
    "device",
    "data",
    "checkpoint_every",
    "distributed",
    "resume",
    "out",
    "debug",
)  # no result depends on them
NO_SETTINGS = ("resume", "out", "debug", "distributed")  # are not in config.json, or not as flags
SETTINGS_OF_EVERY_RUN = ("seed", "blocks", "epochs", "batch_size")  # others may be younger than the run


def make_parser():
    parser = argparse.ArgumentParser(description="Train the residual network on CIFAR-10.", allow_abbrev=False)
    add = parser.add_argument
    add("--device", choices=["auto", "cpu", "gpu"], default="auto", help="auto, the default: a GPU where there is one")
    add(
        "--precision",
        choices=list(PRECISIONS),
        help="of convolutions: on the CPU float32; on a GPU also tf32, the default there for the report's recipe, and "
        "fp16, the default for others, with weights and sums in float32",
    )
    add("--graph", action=argparse.BooleanOptionalAction, default=True, help="on a GPU, record a step and replay it")
    add(
        "--data",
        type=data_folder,
        metavar="sample|DIR",
        help="the built-in sample or a folder; default $MINIRES_DATA, ~/.cache/minires",
    )
    add(
        "--seed",
        type=at_least(0, below=2**64),
        default=0,
        metavar="N",
        help="of weights, split, order, augmentation and dropout",
    )
    add("--out", type=folder, metavar="DIR", help="the run folder (default: runs/ and the time)")
    add("--limit-batches", type=at_least(1), metavar="N", help="use only the first N batches of every pass, for a try")
    add("--blocks", type=at_least(1), nargs=4, default=[2, 1, 1, 1], metavar="N", help="of each stage, default 2 1 1 1")
    add(
        "--channels",
        type=at_least(1),
        nargs=4,
        default=[64, 128, 256, 512],
        metavar="N",
        help="of each stage, default 64 128 256 512; 8 16 32 64 trains five times as fast",
    )
    add("--no-shortcut", action="store_true", help="the plain network, without shortcuts")
    add("--no-batch-norm", action="store_true", help="the network without normalisation")
    add("--no-augment", action="store_true", help="no crop, flip, cutout and TrivialAugment but what is given")
    add("--checkpoint-every", type=not_negative, default=10, metavar="MINUTES", help="default 10; 0: after each step")
    add("--resume", type=folder, metavar="RUN_FOLDER", help="resume a run, with the flags it was begun with")
    add("--distributed", action="store_true", help="take MPI also where no mpiexec or srun is seen")
    add(
        "--local-batch-norm",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="each of several processes normalises by the statistics of its own part of a batch",
    )
    add("--debug", action="store_true", help="errors with a traceback; on a GPU a look for NaN at each step")
    add("--recipe", choices=list(RECIPES), default="report", help="sets all that follows; default report")

    group = parser.add_argument_group("ingredients of a recipe", "; ".join(RECIPES) + ": in this order below")

    def ingredient(flag, help, **settings):
        name = flag[2:].replace("-", "_")
        values = [str((RECIPES["report"] | recipe)[name]) for recipe in RECIPES.values()]
        if "choices" not in settings and "action" not in settings:
            settings.setdefault("metavar", "N")
        group.add_argument(flag, help=f"{help} ({', '.join(values)})", **settings)

    switch = argparse.BooleanOptionalAction
    ingredient("--epochs", "passes over the training images", type=at_least(1))
    ingredient("--batch-size", "images in a step", type=at_least(2))
    ingredient("--optimizer", "how the weights move", choices=["adam", "sgd", "muon"])
    ingredient("--lr", "learning rate, the highest of the schedule", type=positive, metavar="RATE")
    ingredient("--schedule", "of the learning rate", choices=list(SCHEDULES))
    ingredient("--momentum", "of sgd, and of muon but for filters", type=probability, metavar="M")
    ingredient("--nesterov", "that momentum in Nesterov's form", action=switch)
    ingredient("--bias-lr", "learning rate of BatchNorm's biases, in parts of --lr", type=positive, metavar="RATE")
    ingredient("--filter-lr", "of muon: the rate of filters, in parts of --lr", type=positive, metavar="RATE")
    ingredient("--weight-decay", "added to the gradient, times the weight", type=not_negative, metavar="W")
    ingredient("--decay-vectors", "weight decay on biases and BatchNorm too", action=switch)
    ingredient("--clip", "shorten gradients whose norm is larger", type=positive, metavar="NORM")
    ingredient("--label-smoothing", "share of the target spread over all classes", type=probability, metavar="S")
    ingredient("--dropout", "before the last layer", type=probability, metavar="P")
    ingredient("--crop", "move images by up to N pixels each way", type=at_least(0))
    ingredient("--flip", "mirror images", choices=FLIPS)
    ingredient("--cutout", "cover a square of N x N pixels", type=at_least(0))
    ingredient("--trivial-augment", "one random operation for each image", action=switch)
    ingredient("--early-size", "side of the images in the first half of the epochs; 0: as they are", type=at_least(0))
    ingredient("--ema", "average the weights with this decay; 0: do not", type=probability, metavar="DECAY")
    ingredient("--tta", "measure on mirrored test images as well", action=switch)
    ingredient("--full-train", "train on all training images; the last weights are kept", action=switch)

    return parser


def parse_arguments(argv=None):
    """Return the flags with the values of the recipe where none is given, and a dict of those that are given.

    Args        argv: the words of the command line, by default this process's own
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    parser.set_defaults(**RECIPES["report"] | RECIPES[args.recipe] | (NO_AUGMENT if args.no_augment else {}))
    args = parser.parse_args(argv)
    if args.optimizer == "sgd" and args.nesterov and not args.momentum:
        parser.error("--momentum 0 has no Nesterov form: add --no-nesterov")
    if args.optimizer == "muon" and not args.momentum:
        parser.error("--optimizer muon needs a --momentum above 0, got 0")
    unset = argparse.Namespace(**dict.fromkeys(vars(args)))  # a flag that is not given stays None
    given = {name: value for name, value in vars(parser.parse_args(argv, unset)).items() if value is not None}
    return args, given


def choose_precision(args, device):
    """Set how convolutions multiply in this process; the flag gets its default, for config.json.

    A run that was begun on a GPU can be resumed on a CPU, in float32.

    Returns     the dtype of the images, the factor of the loss, whether steps are recorded
    Raises      UsageError for a precision that needs tensor cores, where there are none
    """
    tensor_cores = device == "gpu" and kernels.chosen() == "fast" and gpu.is_for(gpu_library())
    if args.precision is None:
        args.precision = "float32" if not tensor_cores else "tf32" if args.recipe == "report" else "fp16"
    if args.precision != "float32" and not tensor_cores and not args.resume:
        raise UsageError(f"--precision {args.precision} needs a GPU and its fast kernels; without, it is float32")
    if device == "gpu" and not tensor_cores:
        note("note: the reference kernels serve this GPU; the fast ones need compute capability 8.0")
    precision = args.precision if tensor_cores else "float32"
    gpu.set_precision("float32" if precision == "float32" else "tf32")
    recorded = args.graph and precision != "float32"  # cuBLAS, which strict float32 needs, cannot be
    return PRECISIONS[precision], LOSS_SCALE if precision == "fp16" else 1.0, recorded


def resumed_arguments(args, given, config):
    """Return the flags of a run that is resumed: those it was begun with, and the free ones as they are given now.

    Raises      UsageError if others are given, or if what the run says of its flags cannot be
    """
    config = checked(config, args.resume)
    different = [
        f"--{name.replace('_', '-')} is {config.get(name)} in the run and {value} on the command line"
        for name, value in given.items()
        if name not in FREE_IN_A_RESUMED_RUN and value != config.get(name)
    ]
    if "out" in given and given["out"].resolve() != args.resume.resolve():
        different.append(f"--out is {args.resume} in the run and {given['out']} on the command line")
    if different:
        raise UsageError(f"the run in {args.resume} was begun otherwise: {'; '.join(different)}. Leave the flags out")
    begun = {name: config[name] for name in vars(args) if name not in ("resume", "debug")}
    return argparse.Namespace(**{**vars(args), **begun, **given, "out": args.resume})


def checked(config, folder):
    """Return a run's settings, each flag among them as the command line would have it.

    Raises      UsageError for values that no command line gives, and for what are no settings of a run
    """
    missing = [name for name in SETTINGS_OF_EVERY_RUN if name not in config]
    if missing:
        what = ", ".join(missing[:3]) + (" and others" if missing[3:] else "")
        raise UsageError(f"{folder / SETTINGS} is damaged (it lacks {what}): start the run anew in another folder")

    def refuse(message):
        raise UsageError(f"the settings of the run in {folder} are damaged ({message}): start the run anew elsewhere")

    parser = make_parser()
    parser.error = refuse
    parser.set_defaults(**RECIPES["report"])
    config = vars(parser.parse_args([])) | config  # a run from before an ingredient was added has its default
    names = [name for name in vars(parser.parse_args([])) if name in config and name not in NO_SETTINGS]
    flags = []
    for name in names:
        flag, value = f"--{name.replace('_', '-')}", config[name]
        if value is None and name not in MAY_BE_NONE:
            refuse(f"{flag} is null")
        if isinstance(value, list):
            flags += [flag, *map(str, value)]
        elif isinstance(value, bool):
            flags += [flag] if value else [] if name.startswith("no_") else [f"--no-{flag[2:]}"]
        elif value is not None:
            flags.append(f"{flag}={value}")
    return config | {name: value for name, value in vars(parser.parse_args(flags)).items() if name in names}
