"""A run: what a training loop needs beside the mathematics, for any loop and any Module.

    with Run("runs/mine") as run:
        run.track(model, optimizer, epochs=5, steps_per_epoch=16)
        for epoch in run.epochs():
            for images, labels in run.steps(batches_of(epoch)):
                optimizer.zero_grad()
                logits = model(images)
                loss = loss_function(logits, labels)
                model.backward(loss_function.backward())
                run.count(loss, logits, labels)
                run.check(loss)
                optimizer.step()
            run.validate(lambda: evaluate(model, ..., stop=run.stop_if_asked))

The loop stays yours. `epochs` and `steps` are generators, and what follows a step or an epoch (counting, the progress
bar, the log, a checkpoint, the end that Ctrl-C asks for) happens when the loop comes back for the next one. The same
program, started again on the same folder, resumes the run where it was stopped or killed, and ends with the same bits
as if it had not been: provided that all that is random in a step is drawn from the epoch, the step and the position of
an image (see rng.py and augment.py), not from a generator that lives on.

Where several processes train together (distributed.py), each has a Run, which is given them as `ranks`. Rank 0 alone
touches the folder (`ranks.first`), and what a rank decides by itself (a signal has come, a checkpoint is due) is agreed
on, so that all do the same after the same step.
"""

import contextlib
import functools
import itertools
import json
import math
import numbers
import os
import pathlib
import sys
import time

import numpy as np

from minires.backend import array_module, to_numpy
from minires.console import command_line, note, warn
from minires.layers import Dropout
from minires.training.checkpoint import (
    PREVIOUS,
    load_checkpoint,
    part_of,
    restore_training_state,
    save_checkpoint,
    training_state,
)
from minires.training.distributed import OneProcess
from minires.training.finite import all_finite, find_not_finite
from minires.training.folder import (
    LOG,
    RESULT,
    SETTINGS,
    UsageError,
    check_space,
    locked,
    new_folder,
    read_settings,
    versions,
    write_json,
    write_log,
)
from minires.training.output import Progress, draw, print_row, say
from minires.training.signals import interrupts
from minires.training.storage import CheckpointError, remove_parts, to_json
from minires.training.weights import WEIGHTS, metadata_of, save_weights, write_state

POSITION = ("config", "history", "step", "seen", "loss_sum", "correct", "seconds", "epoch_seconds")  # in a checkpoint
OF_THE_RUN = (  # what a run writes into its settings itself
    *("device", "processes", "parameters", "out", "started"),
    *("minires", "numpy", "python", "machine", "kernels"),
)
MAY_CHANGE_DIGITS = ("minires", "numpy", "kernels", "device", "processes")
STEPS_BETWEEN_READINGS = {"cpu": 1, "gpu": 10}  # reading the loss waits for the GPU
SECONDS_BETWEEN_PICTURES = 10  # a picture takes half a second, an epoch on a GPU hardly more


class Interrupted(SystemExit):
    """A signal has asked the run to end, and it has, with a checkpoint. Where nobody catches it, the program ends."""


class Run:
    """A training run in a folder of its own, which can be stopped anywhere and resumed to the same bits.

    It is used in a with block, which holds the folder for this process alone and hears signals.

    Args        folder: where the run leaves what it makes; None for a new one, runs/ and the time
                resume: True resumes the run in the folder, False begins one in a new or empty folder, None does the one
                or the other, whichever fits the folder
                folder_flag, resume_flag: the options by which this program is told a folder for a new run and that of
                a run to resume, for what is printed; None if it has no such option, and the same command resumes a run
                ranks: the processes that train together, by default this one alone
    Has         folder; resumed; settings, from config.json; step and epoch: the current ones, and total_steps;
                history: a row for each epoch that has ended, as in log.csv
    Raises      UsageError for a folder that cannot be used; CheckpointError if no checkpoint in it can be
    """

    def __init__(self, folder=None, resume=None, *, folder_flag=None, resume_flag=None, ranks=None):
        self.ranks = ranks or OneProcess()
        self.folder = None if folder is None else pathlib.Path(folder)
        if resume is None:
            resume = folder is not None and self.ranks.first(os.path.exists, self.folder / SETTINGS)
        self.resumed, self.folder_flag, self.resume_flag = resume, folder_flag, resume_flag
        self.settings, self.history, self.best = {}, [], {}
        self.step = self.seen = self._kept = 0  # steps done in the run, images seen in the epoch, epoch of the weights
        self._checkpoint, self._signals = None, []

    def __enter__(self):
        with contextlib.ExitStack() as held:
            if self.resumed:
                self._checkpoint, self.settings = self.ranks.first(self._read, held)
            self._held = held.pop_all()
        return self

    def _read(self, held):
        held.enter_context(locked(self.folder))
        checkpoint = load_checkpoint(self.folder)
        if checkpoint:
            return checkpoint, position_of(checkpoint[1], self.folder)["config"]
        return None, read_settings(self.folder)

    def __exit__(self, kind, error, traceback):
        with self._held:
            if kind is Interrupted:
                self._save_unsaved()
                say(self._how_to_resume(), self._signals)

    def __reduce_ex__(self, _):
        raise TypeError("a Run holds its folder for this process alone, and cannot be copied or pickled")

    @property
    def finished(self):
        """Whether the run has come to its end, with a result."""
        return self.resumed and self.ranks.first(os.path.exists, self.folder / RESULT)

    def track(
        self,
        model,
        optimizer,
        average=None,
        *,
        epochs,
        steps_per_epoch,
        settings=None,
        free=(),
        checkpoint_every=10.0,
        check_every=None,
    ):
        """Begin the run of a model and its optimizer, or put them where it was left.

        Args        average: a WeightAverage, or None; settings: a dict of what JSON can hold, for config.json, beside
                    what a run writes there itself; free: names of those that may be others when it is resumed;
                    checkpoint_every: minutes, 0 for after each step; check_every: steps between two looks at the loss
                    and the gradients, by default 1 on the CPU and 10 on a GPU, where looking means waiting
        Raises      UsageError for a disk without room, and for settings that are not those that the run began with;
                    ValueError for numbers of epochs or steps that are no integers of at least 1, and for the optimizer
                    of another model
        """
        for name, value in (("epochs", epochs), ("steps_per_epoch", steps_per_epoch)):
            if not isinstance(value, numbers.Integral) or value < 1:
                raise ValueError(f"Run.track: {name} must be an integer of at least 1, got {value!r}")
        if not {id(p) for p in optimizer.params} <= {id(p) for p in model.parameters()}:
            raise ValueError("Run.track: the optimizer has parameters that are not the model's: make it anew, of those")
        self.model, self.optimizer, self.average = model, optimizer, average
        self.num_epochs, self.steps_per_epoch, self.total_steps = epochs, steps_per_epoch, epochs * steps_per_epoch
        self.checkpoint_every = checkpoint_every
        xp = array_module(optimizer.params[0].data)
        device = "cpu" if xp is np else "gpu"
        self.check_every = check_every or STEPS_BETWEEN_READINGS[device]
        weights = sum(array.nbytes for array in model.state_dict().values())  # a checkpoint has those of the best epoch
        state = sum(array.nbytes for array in training_state(model, optimizer, average).values())
        self.ranks.first(check_space, self.folder or pathlib.Path("runs"), state + weights, weights, self.folder_flag)

        settings = json.loads(to_json(settings or {}))  # as it comes back: with lists in place of tuples
        settings = {name: value for name, value in settings.items() if name not in OF_THE_RUN}
        if self.resumed:
            self._check_settings(settings, free)
            now = {"device": device, "processes": self.ranks.size}
            print_changes({"processes": 1} | self.settings, versions() | now)
            self.settings |= settings | now
        else:
            settings |= {"device": device, "processes": self.ranks.size, "parameters": model.num_parameters()}
            self.folder, self.settings = self.ranks.first(self._begin, settings)
        self.ranks.first(remove_parts, self.folder)
        self._signals = self._held.enter_context(interrupts())

        self.sums = xp.zeros(2, xp.float64)  # of losses and of right answers, in the current epoch
        self._started = self._epoch_started = self._saved_at = time.monotonic()
        if self._checkpoint:
            self._restore(*self._checkpoint)
        self._saved, self._drawn_at = (self.step, len(self.history)), -math.inf
        self._first = self.step + 1

    def _begin(self, settings):
        folder = new_folder(self.folder, self.folder_flag, self.resume_flag)
        self._held.enter_context(locked(folder))
        settings |= {"out": str(folder)} | versions() | {"started": time.strftime("%Y-%m-%d %H:%M:%S")}
        write_json(folder / SETTINGS, settings)
        return folder, settings

    def epochs(self):
        """Yield the number of each epoch that is left; what follows an epoch is done when the loop comes back.

        Raises      RuntimeError where the loop over an epoch's steps was left before its end
        """
        if self.resumed:
            say(f"resuming after step {self.step} of {self.total_steps}", self._signals)
        epochs_before = len(self.history)
        while len(self.history) < self.num_epochs:
            self.epoch = len(self.history) + 1
            yield self.epoch
            self._end_epoch(first=len(self.history) == epochs_before)
        self._save_unsaved()
        self._draw_curves()

    def steps(self, batches):
        """Yield each batch of the epoch that is left; what follows a step is done when the loop comes back.

        Args        batches: all of the epoch, (images, labels) each, a Batches or whatever can be iterated. Those that
                    were done before the run was stopped are left out here
        Raises      ValueError if there are not steps_per_epoch of them
        """
        done = self.step - (self.epoch - 1) * self.steps_per_epoch  # 0, but in an epoch that is resumed
        if done == 0:
            self.seen, self.sums[...], self._epoch_started = 0, 0, time.monotonic()
        batches = batches.skip(done) if hasattr(batches, "skip") else itertools.islice(batches, done, None)
        self._means = self._training_means()
        title = f"epoch {self.epoch:{len(str(self.num_epochs))}}/{self.num_epochs}"
        with Progress(title, self.steps_per_epoch, done, self._signals) as progress:
            for count, batch in enumerate(batches, start=done + 1):
                if count > self.steps_per_epoch:
                    raise ValueError(f"Run.steps: expected {self.steps_per_epoch} batches in an epoch, got more")
                self._batch = batch
                yield batch
                self._end_step(progress)
        done = self.step - (self.epoch - 1) * self.steps_per_epoch
        if done < self.steps_per_epoch:
            raise ValueError(f"Run.steps: expected {self.steps_per_epoch} batches in an epoch, got {done}")
        self._check_same(f"epoch {self.epoch}")
        self._row = {
            "epoch": self.epoch,
            "lr": float(self.optimizer.lr),
            "train_loss": self._means[0],
            "train_accuracy": self._means[1],
            "validation_loss": None,
            "validation_accuracy": None,
        }

    def count(self, loss, logits, labels):
        """Add a step's loss and right answers to those of the epoch, on the device; nothing waits for it.

        Shapes      loss (), the mean over the batch; logits (N, K); labels (N,)
        """
        self.sums[0] += loss * len(labels)
        self.sums[1] += (logits.argmax(axis=1) == labels).sum()

    def check(self, loss, passes=None):
        """End the run if the loss or a gradient is not finite, before the weights move; on a GPU in every tenth step.

        Args        passes: the function of the batch that has filled the gradients, which is called again to find the
                    layer; without it only the forward pass is searched
        Raises      FloatingPointError that names the step, the first layer, and the checkpoint that is left
        """
        if not self._is_read(self.step + 1):
            return
        loss = array_module(self.sums).asarray(loss)  # it may be a plain number
        if all_finite([loss, self.optimizer.flat.grad]):
            return
        for part in self.model.modules():
            if isinstance(part, Dropout) and part.p:
                part.step -= 1  # the same mask again
        passes = getattr(passes, "__wrapped__", passes) or (lambda images, *_: self.model(images))
        what = "a gradient is not finite" if math.isfinite(float(loss)) else f"the loss is {float(loss)}"
        where = self._first_not_finite(lambda: passes(*self._batch))
        seldom = f" (looked at every {self.check_every} steps)" if self.check_every > 1 else ""
        raise self._not_finite(f"{what}: the first number that is not finite is in {where}{seldom}", self.step + 1)

    def validate(self, measure):
        """Measure the model, for the epoch's row, and keep its weights if no epoch before had as low a loss.

        Args        measure: a function without arguments that returns the loss and the accuracy
        Raises      FloatingPointError for a loss that is not finite
        """
        loss, accuracy = map(float, measure())
        if not math.isfinite(loss):
            where = self._first_not_finite(measure)
            what = f"the validation loss is {loss}: the first number that is not finite is in {where}"
            raise self._not_finite(what, self.step)
        self._row |= {"validation_loss": loss, "validation_accuracy": accuracy}
        if self._is_best():
            self.keep_weights()

    def _is_best(self):
        return self._row is best_of([*self.history, self._row])

    def keep_weights(self):
        """Keep the model's weights as they are now.

        Without validation, call it in the last epoch, or never: then those after the last epoch are kept.
        """
        self.best, self._kept = self.model.state_dict(), self.epoch
        self.ranks.first(save_weights, self.folder / WEIGHTS, self.model, self._row)

    def stop_if_asked(self):
        """Raise Interrupted if a signal has come. For passes that take long, as `evaluate` is given it."""
        if signal := self._signal():
            raise Interrupted(128 + signal)  # as shells count a process that a signal has ended

    def finish(self, result):
        """Write result.json, with what is known of the weights that were kept and the seconds; return it all.

        Where the loop over epochs was left early, the epoch in which it was left is the last, and is ended first: put
        no other weights into the model before that.

        Raises      RuntimeError where the loop over that epoch's steps was left before its end
        """
        if self.step > len(self.history) * self.steps_per_epoch:  # the loop over epochs was left early
            self.num_epochs = self.epoch
            self._end_epoch(first=not self.history)
            self._save_unsaved()
        best = best_of(self.history)
        result = result | {
            "best_epoch": best["epoch"],
            "validation_loss": best["validation_loss"],
            "validation_accuracy": best["validation_accuracy"],
            "seconds": round(time.monotonic() - self._started, 1),
        }
        self._write_log()
        self.ranks.first(write_json, self.folder / RESULT, result)
        self.ranks.first(functools.partial((self.folder / PREVIOUS).unlink, missing_ok=True))
        return result

    def save(self):
        """Write a checkpoint."""
        now = time.monotonic()
        state = training_state(self.model, self.optimizer, self.average)
        state |= {f"best.{name}": array for name, array in self.best.items()}
        sums = self._sums_of_all()
        position = {
            "step": self.step,
            "history": self.history,
            "seconds": now - self._started,
            "epoch_seconds": now - self._epoch_started,
            "seen": self.seen,
            "loss_sum": float(sums[0]),
            "correct": int(sums[1]),
            "lr": float(self.optimizer.lr),
            "config": self.settings,
        }
        try:
            self.ranks.first(save_checkpoint, self.folder, state, position)
        except FloatingPointError as error:
            raise self._not_finite(error, self.step) from error
        self._saved, self._saved_at = (self.step, len(self.history)), time.monotonic()

    def _restore(self, state, position):
        """Put everything where a checkpoint was written; the files beside it may be ahead of it."""
        restore_training_state(self.model, self.optimizer, self.average, state)
        self.best, self.history, self.step = part_of(state, "best."), position["history"], position["step"]
        if not 0 <= self.step - len(self.history) * self.steps_per_epoch <= self.steps_per_epoch:
            raise UsageError(
                f"the run in {self.folder} has done {self.step} steps in {len(self.history)} epochs and a part, which "
                f"have not {self.steps_per_epoch} steps each: resume it with the data and batches that it began with"
            )
        self.seen, self.sums[0], self.sums[1] = position["seen"], position["loss_sum"], position["correct"]
        self.sums *= self.ranks.rank == 0  # which has the sums of all; those of the others begin at 0
        self.optimizer.lr = position.get("lr", self.optimizer.lr)
        self._started -= position["seconds"]
        self._epoch_started -= position["epoch_seconds"]
        if self.best and self.history:  # else the first epoch's validation is done again
            metadata = best_row_of(self.history) | metadata_of(self.model)
            self.ranks.first(write_state, self.folder / WEIGHTS, self.best, metadata)
        self._write_log()

    def _end_step(self, progress):
        self.step += 1
        images = self.ranks.total or len(self._batch[-1])
        self.seen += images
        if self._is_read(self.step):
            self._means = self._training_means()
        progress.update(images, *self._means, self._is_last(self.step))
        if self.step == self._first:  # a processor of another kind adds otherwise from the first step on
            self._check_same(f"step {self.step}")
        self._save_if_due()
        self.stop_if_asked()

    def _check_same(self, when):
        self.ranks.same_statistics(self.model)
        if self.ranks:
            self.ranks.check_same(training_state(self.model, self.optimizer, self.average), when)

    def _end_epoch(self, first):
        steps = self.step - (self.epoch - 1) * self.steps_per_epoch
        if steps != self.steps_per_epoch:
            raise RuntimeError(
                f"Run.epochs: epoch {self.epoch} was left after {steps} of {self.steps_per_epoch} steps: let the loop "
                "over Run.steps come to its end"
            )
        if self.epoch == self.num_epochs and self._kept != self.epoch and self._is_best():
            self.keep_weights()
        self._row["seconds"] = round(time.monotonic() - self._epoch_started, 1)
        self.history.append(self._row)
        self._write_log()
        self._save_if_due()
        print_row(self._row, first, self._signals)
        if time.monotonic() - self._drawn_at >= SECONDS_BETWEEN_PICTURES:
            self._draw_curves()
        self.stop_if_asked()

    def _is_last(self, step):
        """Whether a step, counted from 1, is the epoch's last, or the last before the run ends as it was asked to."""
        return step == self.epoch * self.steps_per_epoch or bool(self._signal())

    def _is_read(self, step):
        """Whether the numbers of a step, counted from 1, are read from the device."""
        return self._is_last(step) or (step - 1) % self.check_every == 0

    def _signal(self):
        """The number of a signal that has come to any process, or 0."""
        return self.ranks.largest(self._signals[0] if self._signals else 0)

    def _sums_of_all(self):
        return self.ranks.sum(np.array(to_numpy(self.sums)))

    def _training_means(self):
        return tuple(float(total) / max(self.seen, 1) for total in self._sums_of_all())

    def _first_not_finite(self, passes):
        """The first layer that is not finite, in the process that came to it first."""
        found = self.ranks.gather(find_not_finite(self.model, passes))
        _, rank = min((found[rank][0], rank) for rank in range(self.ranks.size))
        return (found[rank][1] or "the loss itself") + (f" of rank {rank}" if self.ranks.size > 1 else "")

    def _save_if_due(self):
        due = time.monotonic() - self._saved_at >= 60 * self.checkpoint_every
        if self.ranks.largest(int(due and self.ranks.rank == 0)):
            self.save()

    def _save_unsaved(self):
        if self._saved != (self.step, len(self.history)):
            self.save()

    def _write_log(self):
        if self.history:
            try:
                self.ranks.first(write_log, self.folder / LOG, self.history)
            except OSError as error:  # on Windows, for as long as another program has it open
                warn(f"{error.filename}: {error.strerror}; all rows are written next time")

    def _draw_curves(self):
        if self.history and self.ranks.rank == 0:
            draw("plot_curves", self.history, self.folder / "curves.png")
            self._drawn_at = time.monotonic()

    def _not_finite(self, what, step):
        kept = f"the checkpoint after step {self._saved[0]} is kept" if self._saved[0] else "there is no checkpoint yet"
        return FloatingPointError(f"in epoch {self.epoch}, step {step} {what}; {kept}")

    def _check_settings(self, settings, free):
        different = [
            f"{name} is {self.settings[name]} in the run and {value} now"
            for name, value in settings.items()
            if name in self.settings and name not in free and to_json(self.settings[name]) != to_json(value)
        ]
        if different:
            raise UsageError(
                f"the run in {self.folder} was begun otherwise: {'; '.join(different)}. Name another folder"
            )

    def _how_to_resume(self):
        epoch = min(len(self.history) + 1, self.num_epochs)
        line = f"\ninterrupted in epoch {epoch}, after step {self.step} of {self.total_steps}; to resume"
        program = pathlib.Path(sys.argv[0]).absolute()
        if not program.is_file():  # python -c, a notebook
            return f"{line}:\n    the same program, on the folder {self.folder.absolute()}"
        command = ["mpiexec", "-n", self.ranks.size] if self.ranks.size > 1 else []
        command += [sys.executable, str(program)]
        module = getattr(sys.modules["__main__"], "__spec__", None)
        if module and module.origin == str(program):  # python -m, which imports from the folder that it is run in
            command[-1:] = ["-m", module.name]
            line += f", in {os.getcwd()}"
        command += [self.resume_flag, str(self.folder.absolute())] if self.resume_flag else sys.argv[1:]
        return f"{line}:\n    {command_line(command)}"


def position_of(metadata, folder):
    """Return what a checkpoint's metadata say of where the run was.

    Raises      CheckpointError for the checkpoint of another program
    """
    missing = [name for name in POSITION if name not in metadata]
    if missing or not isinstance(metadata["config"], dict) or not isinstance(metadata["history"], list):
        raise CheckpointError(
            f"the checkpoint in {folder} is not one of a Run: it lacks {', '.join(missing) or 'a position'}; "
            "name the folder of such a run"
        )
    return metadata


def best_of(history):
    """Return the row of the epoch whose weights are kept: the lowest validation loss, or the last without any."""
    measured = [row for row in history if row["validation_loss"] is not None]
    return min(measured, key=lambda row: row["validation_loss"]) if measured else history[-1]


def best_row_of(history):
    """Return what best.safetensors says of its epoch: the row without the seconds, which differ from run to run."""
    return {name: value for name, value in best_of(history).items() if name != "seconds"}


def print_changes(then, now):
    """Say what has changed since a run began that may change the last digits."""
    changed = [name for name in MAY_CHANGE_DIGITS if then.get(name) != now[name]]
    if changed:
        changes = "; ".join(f"{name} {then.get(name)} then, {now[name]} now" for name in changed)
        note(f"note: {changes}: last digits may differ from those of a run that never stopped")
