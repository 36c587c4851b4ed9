"""The bug hunt: a copy of minires with one line changed. Which one?

    python examples/lessons/bugs.py list            the bugs, from loud to silent, by their symptoms
    python examples/lessons/bugs.py plant 7 DIR     copy the project to DIR and plant bug 7 there
    python examples/lessons/bugs.py check 7 DIR     is it still there? what the symptom is, measured
    python examples/lessons/bugs.py solve 7         the line, what it does, and how one finds it

Each is a mistake that a careful person could make, and many are known from projects that were published with them. The
loud ones end a training in its first minute. The silent ones cost a point of accuracy, or claim one that is not there,
and no gradient check sees them: most gradients here are right. So for each bug `solve` names the tool that finds it.

Your project is not touched. Comparing the copy with it would find every bug, and teach nothing; its tests would find
them too, which is what tests are for, so they are not copied.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap
from typing import NamedTuple

from minires.console import command_line
from minires.training import UsageError
from minires.training.script import run_script

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
CHECKS = pathlib.Path(__file__).with_name("bug_checks.py")
NOT_PLANTED = ("tests", "bugs.py", "bug_checks.py", "RESULTS.md")  # what would tell

# The tools
STEP_0 = "the loss at step 0"
OVERFITTING = "32 images overfitted"
FINITE = "the finite check"
GRADIENTS = "the gradient check"
CURVES = "the curves"
LOOKING = "looking at the images"
BY_HAND = "a case worked out by hand"
READING = "reading"

# Commands that show a symptom in a copy; -m, so that Python takes the minires of the folder it is in
FIRST = "-m examples.first_training"
SANITY = "-m examples.lessons.sanity"
TRAIN = "-m examples.train_cifar --data sample --batch-size 50 --channels 16 16 32 32"

REFERENCE = "minires/kernels/reference.py"
LAYERS = "minires/layers.py"
RESNET = "minires/resnet.py"
OPTIM = "minires/optim.py"
AUGMENT = "minires/augment.py"
EVALUATION = "minires/evaluation.py"
CIFAR10 = "minires/cifar10/__init__.py"
TRAIN_CIFAR = "examples/train_cifar.py"


class Bug(NamedTuple):
    """A change of one line, or two lines exchanged; `old` stands exactly once in the file.

    `see` is a command that shows the symptom in training, "" where only a measurement does; `check` a function of
    bug_checks.py.
    """

    symptom: str
    see: str
    file: str
    old: str
    new: str
    what: str
    how: str
    tool: str
    check: str


BUGS = [
    Bug(
        "The loss climbs from the first step on.",
        see=FIRST,
        file=REFERENCE,
        old="param -= (lr / (1 - beta1**step)) * m / rms",
        new="param += (lr / (1 - beta1**step)) * m / rms",
        what="The gradient points to where the loss grows. A step has to go against it.",
        how="The loss is larger after one step, and with a smaller lr still larger, only less. A gradient check cannot "
        "see it: the gradients are right, and what is done with them is wrong.",
        tool=CURVES,
        check="steps_go_downhill",
    ),
    Bug(
        "A fresh network is sure of its answers, and wrong: the first loss is 5 and more.",
        see=SANITY,
        file=LAYERS,
        old="bound = 1 / math.sqrt(in_features)",
        new="bound = math.sqrt(in_features)",
        what="The last layer's initial weights are in_features times too large, and with them the logits. Softmax "
        "makes probabilities of almost 0 and 1 of them, and the first epochs only take this back.",
        how="Before the first step nothing is known, so each of ten classes should have a tenth: the loss is ln 10 = "
        "2.303.",
        tool=STEP_0,
        check="loss_begins_at_ln_10",
    ),
    Bug(
        "One batch of black images, or one dead channel, and the loss is nan.",
        see=SANITY,
        file=REFERENCE,
        old="return 1 / array_module(var).sqrt(var + eps)",
        new="return 1 / array_module(var).sqrt(var)",
        what="eps has gone from BatchNorm's square root. A channel that is the same everywhere has the variance 0, and "
        "is divided by 0.",
        how="The search for the first number that is not finite (training/finite.py) names a BatchNorm. Forward and "
        "backward leave eps out alike, so the gradient check passes.",
        tool=FINITE,
        check="black_images_are_finite",
    ),
    Bug(
        "Nothing is learned: the training loss stays at 2.3.",
        see=FIRST,
        file="minires/batches.py",
        old="self.transform(self.images[index], index, start), self.labels[index]",
        new="self.transform(self.images[index], index, start), self.labels[start : start + at_once]",
        what="Images are taken in the epoch's random order, labels in that of the data set. Each image has the label "
        "of another one, in every epoch of another one.",
        how="Even 32 images cannot be overfitted, if they come through the same batches. Then look at some images with "
        "their labels, as the network is given them.",
        tool=OVERFITTING,
        check="labels_stay_with_their_images",
    ),
    Bug(
        "The loss swings back and forth, and hardly falls.",
        see=FIRST,
        file=OPTIM,
        old="self.steps = 0\n\n    def zero_grad(self):\n        self.flat.zero_grad()",
        new="self.steps = 0\n\n    def zero_grad(self):\n        self.flat.zero_grad",
        what="Without its parentheses the method is named, not called. Every backward adds to the gradients, so a step "
        "follows the sum of all gradients since the first.",
        how="Overfitting 32 images takes several times as many steps, and the loss goes up in between. A linter sees "
        "the expression that does nothing. The gradient check begins with gradients of 0, and passes.",
        tool=OVERFITTING,
        check="zero_grad_sets_gradients_to_0",
    ),
    Bug(
        "The training loss falls as it should; the test loss is above 1,000.",
        see=FIRST,
        file=REFERENCE,
        old="running *= 1 - momentum",
        new="running *= momentum",
        what="The running statistics keep a tenth of their past rather than nine tenths, and settle at a ninth of the "
        "true values. Training uses those of the batch and does not notice; evaluation divides by them.",
        how="Training and validation loss part from the first epoch on, far too early for overfitting. Evaluate the "
        "training images themselves: if they are as bad, it is the mode, not the images.",
        tool=CURVES,
        check="running_statistics_arrive",
    ),
    Bug(
        "The whole network, with all its 4,977,226 parameters, cannot memorise 32 images.",
        see=f"{SANITY} --full",
        file=RESNET,
        old="self.dropout = Dropout(dropout, rng=rng)\n        self.linear = Linear(in_channels, num_classes, rng=rng)",
        new="self.linear = Linear(in_channels, num_classes, rng=rng)\n        self.dropout = Dropout(dropout, rng=rng)",
        what="Dropout comes after the last layer, and sets half of the logits to 0, in half of all cases the right one "
        "among them. The script of the report that this network is from does so.",
        how="A loss that training cannot bring down: 0.8 for 32 images, where it should be near 0. The network with "
        "few channels has no dropout, and passes. Count how many logits are exactly 0.",
        tool=OVERFITTING,
        check="no_logit_is_dropped",
    ),
    Bug(
        "The same weights, evaluated twice on the same images, have two accuracies.",
        see="",
        file=LAYERS,
        old="if not self.training or self.p == 0:",
        new="if self.p == 0:",
        what="Dropout stays on in evaluation. The accuracy is that of a network with half of its features missing, and "
        "a point or more too low.",
        how="Evaluate twice: what is drawn at random is not over when training is. Then read who asks for "
        "self.training.",
        tool=BY_HAND,
        check="evaluation_repeats_itself",
    ),
    Bug(
        "What the network says of an image depends on which images it is evaluated with.",
        see="",
        file=EVALUATION,
        old="    model.eval()\n",
        new="    model.train()\n",
        what="Test images are evaluated in training mode, as in the report's script: BatchNorm normalises by the "
        "statistics of the test batch, and takes them into the running ones.",
        how="Evaluate one image alone and in a batch. With batches of one class, the accuracy collapses.",
        tool=BY_HAND,
        check="images_are_measured_alone",
    ),
    Bug(
        "With MINIRES_KERNELS=reference the network learns less than with the fast kernels.",
        see="",
        file=REFERENCE,
        old="padded[pixels_of_tap(h, w, padded.shape, kernel_size, stride)] += windows[:, :, :, h, w]",
        new="padded[pixels_of_tap(h, w, padded.shape, kernel_size, stride)] = windows[:, :, :, h, w]",
        what="A pixel is in up to nine windows, and influences the loss through each. Of the nine gradients, the last "
        "one is kept and the others are lost.",
        how="The gradient of a convolution's input is wrong, those of its weights are right. im2col and col2im are "
        "adjoint, <im2col(x), c> = <x, col2im(c)>, and here they are not.",
        tool=GRADIENTS,
        check="both_kernels_agree",
    ),
    Bug(
        "Some weights are the same after training as before.",
        see=SANITY,
        file=RESNET,
        old="return kernels_for(dx).add(dx, self.shortcut.backward(dshortcut))",
        new="return dx",
        what="x influences the loss through the convolutions and through the shortcut, and the second gradient is left "
        "out. Nothing flows back through a shortcut, which is what a residual network has it for.",
        how="The gradient check names x and the weights of the shortcut. So does a look at which weights a step has "
        "moved.",
        tool=GRADIENTS,
        check="shortcuts_have_gradients",
    ),
    Bug(
        "With SGD, the best learning rate depends on the batch size: twice the batch, half the rate.",
        see="",
        file=REFERENCE,
        old="return dlogits * (dloss / N)",
        new="return dlogits * dloss",
        what="The loss is the mean over the batch, its gradient that of the sum. Adam, for which the scale of a "
        "gradient does not count, hides it; with SGD the first steps are N times too long.",
        how="The gradient check of the loss alone, which nobody thinks of, as it is so short.",
        tool=GRADIENTS,
        check="gradient_is_that_of_the_mean",
    ),
    Bug(
        "Outputs of BatchNorm in training have a variance below 1, and the more so the smaller the batch.",
        see="",
        file=REFERENCE,
        old="return mean, sum_over_rows(centred * centred) / M",
        new="return mean, sum_over_rows(centred * centred) / (M - 1)",
        what="The variance of the batch is divided by M - 1. That is right for the running variance, which estimates "
        "the variance of all images, and wrong here: the backward is derived for M.",
        how="The gradient check: wrong by one part in M. It has to be strict, and its batch small, to see that. "
        "Training with 131,072 rows does not.",
        tool=GRADIENTS,
        check="batch_norm_gives_variance_1",
    ),
    Bug(
        "Adam with a constant lr of 0.003 begins as it should, and after 20 steps goes on as if it were 0.03.",
        see=SANITY,
        file=REFERENCE,
        old="param -= (lr / (1 - beta1**step)) * m / rms",
        new="param -= (lr / (1 - beta1)) * m / rms",
        what="Adam's correction of the first moment has lost its power. It is right at step 1; later 1 - beta1^step "
        "goes to 1, and this stays 0.1: each step is ten times too long.",
        how="For a constant gradient, every step of Adam is lr long: three lines of arithmetic. In a training, the "
        "ratio of update to weight is several times the usual one.",
        tool=BY_HAND,
        check="adam_moves_by_lr",
    ),
    Bug(
        "Each convolution takes more than half of the size of activations away; only BatchNorm brings it back.",
        see=SANITY,
        file=LAYERS,
        old="deviation = math.sqrt(2 / (kernel_size**2 * in_channels))",
        new="deviation = math.sqrt(1 / (3 * kernel_size**2 * in_channels))",
        what="The initial weights have a sixth of the variance that keeps the scale of activations: PyTorch's default. "
        "Each convolution shrinks what it is given to 0.4 of its size, and BatchNorm, where there is one, mends it.",
        how="The table of sanity.py: the first convolution's output has a deviation of about 0.6, where He's weights "
        "give 1.4, the square root of 2 for normalised images. Var(y) = n Var(weight) E[r^2] says which variance it "
        "is.",
        tool=BY_HAND,
        check="initial_weights_have_variance_2_over_n",
    ),
    Bug(
        "Dropout of 0.2 holds the network back more than dropout of 0.5.",
        see=f"{TRAIN} --epochs 10 --dropout 0.2",
        file=REFERENCE,
        old="kept = (words >= int(p * 2**32)).reshape(x.shape)",
        new="kept = (words < int(p * 2**32)).reshape(x.shape)",
        what="p and 1 - p are exchanged: four fifths are set to 0, and the rest is scaled for one fifth. At the usual "
        "p of 0.5 nothing is different, so tests with the default pass.",
        how="Count the zeros at another p than 0.5. The backward draws the same mask, so the gradient check passes.",
        tool=BY_HAND,
        check="dropout_drops_p",
    ),
    Bug(
        "The learning rate of a cosine schedule hardly comes down, and the last epochs bring nothing.",
        see=f"{TRAIN} --epochs 10 --schedule cosine",
        file=TRAIN_CIFAR,
        old="SCHEDULES[args.schedule](run.step, run.total_steps, args.lr)",
        new="SCHEDULES[args.schedule](run.epoch, run.total_steps, args.lr)",
        what="The schedule is asked by epochs for its way through steps, and the run ends near its beginning. The "
        "report's script does the like: a cosine over 200 epochs in a run of 20.",
        how="The column lr of the run's table, or of log.csv: a schedule ends near 0.",
        tool=CURVES,
        check="rate_comes_down",
    ),
    Bug(
        "In images.png each picture is nine small gray ones. The network learns all the same, only less.",
        see=f"{TRAIN} --epochs 1",
        file=CIFAR10,
        old="np.ascontiguousarray(planes.transpose(0, 2, 3, 1))",
        new="np.ascontiguousarray(planes.reshape(-1, 32, 32, 3))",
        what="The file has all red values, then all green, then all blue. A reshape to channels last has the right "
        "shape and mixes pixels and colors up; only a transpose moves an axis.",
        how="Look at what the network is given, before anything else. No number tells: shapes, means of all values and "
        "gradients are right.",
        tool=LOOKING,
        check="channels_are_colors",
    ),
    Bug(
        "Training with mirrored images helps less than in everybody else's hands, or even harms.",
        see="",
        file=AUGMENT,
        old="images[:, :, ::-1], images)",
        new="images[:, ::-1], images)",
        what="The images are mirrored top for bottom: axis 1 is the width in (N, C, W) thinking, and the height in "
        "NHWC. The network learns of ships and horses on their heads, which no test image shows.",
        how="Look at augmented images.",
        tool=LOOKING,
        check="flip_exchanges_left_and_right",
    ),
    Bug(
        "Normalised training images have a standard deviation of 1.2, not 1.",
        see="",
        file=CIFAR10,
        old="STD = (0.24703223, 0.24348513, 0.26158784)",
        new="STD = (0.2023, 0.1994, 0.2010)",
        what="These three numbers are in very many programs. They are the mean of each image's own deviation, which "
        "leaves out how images differ from each other. As training and test use the same ones, it costs little.",
        how="Measure the deviation of what the network is given, or compute the constants anew: cifar10.statistics.",
        tool=BY_HAND,
        check="images_are_normalised",
    ),
    Bug(
        "Weights decay faster than lr times weight decay says; a published value of it works badly here.",
        see="",
        file=REFERENCE,
        old="param -= lr * grad",
        new="param -= lr * (grad + weight_decay * param)",
        what="The decay is in the gradient already, and is subtracted from the weight once more.",
        how="A step with a gradient of 0, from which the decay alone follows: w (1 - lr weight_decay).",
        tool=BY_HAND,
        check="weights_decay_once",
    ),
    Bug(
        "The validation loss of averaged weights jumps up and down as if they were not averaged.",
        see=f"{TRAIN} --epochs 10 --optimizer sgd --lr 0.2 --dropout 0 --ema 0.95",
        file=EVALUATION,
        old="average.swap()\n    try:\n        measure_statistics(model, batches)\n",
        new="measure_statistics(model, batches)\n    try:\n        average.swap()\n",
        what="BatchNorm's statistics are measured before the averaged weights are in place. They belong to other "
        "weights, whose activations are larger.",
        how="Measure the statistics again inside the block: they change, and the accuracy with them. Then read the "
        "order of the lines.",
        tool=READING,
        check="averages_have_their_own_statistics",
    ),
    Bug(
        "A loop that halves optimizer.lr now and then is back at the first rate after a run was resumed.",
        see="",
        file="minires/training/run.py",
        old='position.get("lr", self.optimizer.lr)',
        new='position.get("learning_rate", self.optimizer.lr)',
        what="The checkpoint calls it lr. A get with a default hides every misspelling, and the optimizer keeps the "
        "rate that it was made with. The loss jumps where the run was resumed.",
        how="Stop a run, resume it, and compare with one that was not stopped: the same bits, or it is not resumed.",
        tool=READING,
        check="rate_survives_the_night",
    ),
    Bug(
        "In each epoch the first image of a batch is moved as the first image of every other batch.",
        see="",
        file=TRAIN_CIFAR,
        old="random_crop(images, args.seed, epoch, start, args.crop)",
        new="random_crop(images, args.seed, epoch, 0, args.crop)",
        what="The position in the epoch is what the crop is drawn from, and every batch gets that of the first. There "
        "are 128 crops in an epoch rather than 40,000. Each looks right; the network overfits a little earlier.",
        how="Nothing shows it but reading, or printing the draws of two batches. A like bug, one random state for all "
        "workers that load images, was in very many PyTorch programs.",
        tool=READING,
        check="batches_have_their_own_crops",
    ),
    Bug(
        "Every test accuracy on the 500 images of the sample is a whole percent.",
        see=FIRST,
        file=EVALUATION,
        old="float((logits.argmax(axis=1) == labels).mean())",
        new="float((logits.argmax(axis=1) == labels)[(len(labels) - 1) // batch_size * batch_size :].mean())",
        what="The accuracy is that of the last batch: 100 images of 500 here. In the report's script these are 16 of "
        "10,000, and its 87.5 % are 14 of 16. The mean is right, but its error is 25 times what one thinks.",
        how="One image of 500 is 0.2 %: numbers that are too round were counted on fewer. Shuffle the test images, and "
        "the accuracy changes.",
        tool=READING,
        check="accuracy_is_of_all_images",
    ),
    Bug(
        "The validation accuracy is well above the test accuracy, and the more so the longer one trains.",
        see=f"{TRAIN} --epochs 30",
        file=CIFAR10,
        old="return order[validation:], order[:validation]",
        new="return order[validation:], order[-validation:]",
        what="The validation images are the last ones of the order, and all of them are trained on too. Validation "
        "measures what was memorised.",
        how="Validation follows training in the curves, and test does not. The two parts have images in common: "
        "np.intersect1d.",
        tool=CURVES,
        check="no_image_is_on_both_sides",
    ),
    Bug(
        "The best validation loss and the test loss are the same to the last digit; the accuracy is a little too good.",
        see=f"{TRAIN} --epochs 3",
        file=TRAIN_CIFAR,
        old="run.validate(functools.partial(measure, model, data.validation, run))",
        new="run.validate(functools.partial(measure, model, data.test, run))",
        what="The epoch to keep is chosen on the test images. Of twenty epochs the luckiest is taken, and its luck is "
        "in the result, which claims to be of images that nobody has looked at.",
        how="Only reading: follow the test images through the program, and see who looks at them before the end.",
        tool=READING,
        check="epochs_are_chosen_by_validation",
    ),
]


def planted(project, bug):
    """Return the text of the bug's file in a project, with the bug in it. Nothing is written.

    Args        project: a folder; bug: what has file, old and new
    Raises      ValueError if `old` does not stand exactly once in the file, so that the bug fits the project no longer
    """
    path = pathlib.Path(project, bug.file)
    text = path.read_text("utf-8") if path.exists() else ""
    if text.count(bug.old) != 1 or bug.old == bug.new:
        raise ValueError(f"the text stands {text.count(bug.old)} times in {bug.file}, expected once: {bug.old!r}")
    return text.replace(bug.old, bug.new)


def copy_project(folder, leave_out=()):
    """Copy this project into a folder that does not exist or is empty, without what is hidden, runs and builds.

    Args        leave_out: names of files and folders
    """
    ignored = shutil.ignore_patterns(".*", "runs", "build", "__pycache__", "*.egg-info", *leave_out)
    shutil.copytree(ROOT, folder, ignore=ignored, dirs_exist_ok=True)


def plant(bug, folder):
    """Copy the project, without what would tell, and plant a bug in the copy.

    Raises      UsageError for a folder that is not empty, or that is in the project
    """
    folder = pathlib.Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is there already, and not an empty folder: name a new one")
    if folder.resolve().is_relative_to(ROOT):
        raise UsageError(f"{folder} is in the project itself: name a folder outside {ROOT}")
    text = planted(ROOT, bug)
    copy_project(folder, NOT_PLANTED)
    (folder / bug.file).write_text(text, "utf-8")


def check(bug, folder):
    """Run a bug's check on a copy of the project; return whether the bug has gone, and what was measured."""
    folder = pathlib.Path(folder).absolute()
    if not (folder / "minires").is_dir():
        raise UsageError(f"{folder} holds no minires: name the folder that a bug was planted in")
    # No bytecode: a change of the same length within a second would not be seen
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(CHECKS), bug.check]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    lines = (done.stdout.strip() or done.stderr.strip() or f"the check ended with {done.returncode}").splitlines()
    return done.returncode == 0, lines[-1].removeprefix(f"{bug.check}: ")


def changed_lines(project, bug):
    """Return the lines of a bug's file that it changes, as (number, before, after)."""
    before, after = (text.splitlines() for text in ((project / bug.file).read_text("utf-8"), planted(project, bug)))
    return [(i, *pair) for i, pair in enumerate(zip(before, after, strict=True), 1) if pair[0] != pair[1]]


def print_list():
    for number, bug in enumerate(BUGS, 1):
        print(textwrap.fill(bug.symptom, 100, initial_indent=f"{number:2}  ", subsequent_indent="    "))


def print_planted(number, bug, folder):
    folder = pathlib.Path(folder).absolute()
    this = [sys.executable, str(pathlib.Path(__file__).absolute())]
    print(f"bug {number} is planted in {folder}\n\n{bug.symptom}\n")
    if bug.see:
        print(f"To see it:\n    {command_line(['cd', str(folder)])}\n    {command_line([sys.executable])} {bug.see}\n")
    print(f"Which line is it? In that folder {command_line([sys.executable])} also runs")
    print("    -m examples.lessons.sanity, -m examples.gradcheck and -m examples.train_cifar")
    print(f"Whether it is still there:\n    {command_line([*this, 'check', str(number), str(folder)])}")
    print(f"The solution:\n    {command_line([*this, 'solve', str(number)])}")


def print_solution(number, bug):
    lines = changed_lines(ROOT, bug)
    print(f"{number}  {bug.symptom}\n\n{bug.file}, line {lines[0][0]}")
    for sign, column in (("-", 1), ("+", 2)):  # as it is, and with the bug
        for line in lines:
            print(f"{sign} {line[column].strip()}")
    for title, text in (("What it does", bug.what), ("How to find it", bug.how)):
        print("\n" + textwrap.fill(text, 100, initial_indent=f"{title:16}", subsequent_indent=" " * 16))
    print(f"\n{'The tool':16}{bug.tool}; as a test, {bug.check} in {CHECKS.name}")


def main():
    parser = argparse.ArgumentParser(description="A bug hunt in a copy of minires.", allow_abbrev=False)
    parser.add_argument("--debug", action="store_true", help="errors with a traceback")
    commands = parser.add_subparsers(dest="command", required=True, metavar="list | plant | check | solve")
    commands.add_parser("list", help="the bugs, from loud to silent, by their symptoms")
    for name, text in (
        ("plant", "copy the project and plant a bug in the copy"),
        ("check", "is the bug still there?"),
        ("solve", "the line, what it does, and how one finds it"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("number", type=int, choices=range(1, len(BUGS) + 1), metavar=f"1..{len(BUGS)}")
        if name != "solve":
            command.add_argument("folder", metavar="DIR")
    args = parser.parse_args()
    if args.command == "list":
        print_list()
        return 0
    bug = BUGS[args.number - 1]
    if args.command == "plant":
        plant(bug, args.folder)
        print_planted(args.number, bug, args.folder)
    if args.command == "check":
        mended, found = check(bug, args.folder)
        print(f"bug {args.number} has gone" if mended else f"bug {args.number} is still there: {found}")
        return 0 if mended else 1
    if args.command == "solve":
        print_solution(args.number, bug)
    return 0


if __name__ == "__main__":
    run_script(main)
