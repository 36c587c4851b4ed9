"""Do the tests bite? Plant one bug at a time in a copy of the project, and see which test tells.

    python tests/planted_bugs.py                    plant all, a few seconds each; exit code 1 if a bug is not caught
    python tests/planted_bugs.py batchnorm resume   only those whose name or file has one of these words in it
    python tests/planted_bugs.py --list             what there is

Each bug is a change of one line that a careful person could make, with the tests that have to see it: their names say
what is wrong. Before anything is planted, these tests have to pass on the copy as it is; the project itself is never
touched. tests/test_planted_bugs.py makes sure that the list still fits the code.

A bug that is found in real life and that no test had seen belongs here, and its test with it.
"""

import argparse
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples" / "lessons"))
from bugs import copy_project, planted  # noqa: E402  (the bug hunt's way to plant one)

TIMEOUT = 300  # seconds for the tests of one bug: a bug that hangs is not caught

REFERENCE = "minires/kernels/reference.py"
CPU = "minires/kernels/cpu.py"
WINOGRAD = "minires/kernels/winograd.py"
THREADS = "minires/kernels/threads.py"
MEMORY = "minires/kernels/memory.py"
MODULE = "minires/module.py"
LAYERS = "minires/layers.py"
RESNET = "minires/resnet.py"
OPTIM = "minires/optim.py"
SCHEDULES = "minires/schedules.py"
STORAGE = "minires/training/storage.py"
CHECKPOINT = "minires/training/checkpoint.py"
RUN = "minires/training/run.py"
BATCHES = "minires/batches.py"
EVALUATION = "minires/evaluation.py"
LOOP = "examples/train_cifar.py"


class Bug(NamedTuple):
    """A change of one line; `old` stands exactly once in the file. Tests are joined to "tests/test_<file>.py::"."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple


def bug(name, file, old, new, *tests):
    return Bug(name, file, old, new, tuple("tests/test_" + test.replace("::", ".py::") for test in tests))


BUGS = [
    # reference.py: the mathematics
    bug(
        "relu lets a gradient through at 0",
        REFERENCE,
        "return dout * (out > 0)",
        "return dout * (out >= 0)",
        "reference::test_relu_by_hand",
    ),
    bug(
        "relu works in place",
        REFERENCE,
        "return array_module(x).maximum(x, 0)",
        "return array_module(x).maximum(x, 0, out=x)",
        "module::test_x_and_dout_are_left_as_they_were",
    ),
    bug(
        "sums over rows in float32",
        REFERENCE,
        'return x.sum(axis=tuple(range(x.ndim - 1)), dtype="float64").astype(x.dtype)',
        "return x.sum(axis=tuple(range(x.ndim - 1)), dtype=x.dtype)",
        "reference::test_sums_of_many_float32_rows_lose_no_digits",
    ),
    bug(
        "dropout keeps with p, not 1 - p",
        REFERENCE,
        "words >= int(p * 2**32)",
        "words < int(p * 2**32)",
        "reference::test_dropout_zeroes_with_probability_p_and_keeps_the_expected_value",
    ),
    bug(
        "softmax subtracts the largest logit of the batch, not of the row",
        REFERENCE,
        "shifted = logits - logits.max(axis=1, keepdims=True)",
        "shifted = logits - logits.max()",
        "reference::test_each_row_is_measured_by_its_own_largest_score",
    ),
    bug(
        "softmax's gradient is a sum over the batch, not the mean",
        REFERENCE,
        "return dlogits * (dloss / N)",
        "return dlogits * dloss",
        "reference::test_cross_entropy_by_hand",
        "loss::test_gradient_agrees_with_finite_differences",
    ),
    bug(
        "label smoothing shares among K - 1 classes",
        REFERENCE,
        "dlogits = probabilities - label_smoothing / K",
        "dlogits = probabilities - label_smoothing / (K - 1)",
        "reference::test_label_smoothing_spreads_the_target",
    ),
    bug(
        "max pooling gives all of the gradient to each pixel of a tie",
        REFERENCE,
        "is_largest = (x[pixels] == out) & waiting",
        "is_largest = x[pixels] == out",
        "reference::test_on_a_tie_the_first_of_the_largest_gets_the_gradient",
    ),
    bug(
        "BatchNorm normalises by the unbiased variance",
        REFERENCE,
        "return mean, sum_over_rows(centred * centred) / M",
        "return mean, sum_over_rows(centred * centred) / (M - 1)",
        "reference::test_batch_norm_normalises_channels_of_very_different_scale",
    ),
    bug(
        "BatchNorm's dx lacks the term of the mean",
        REFERENCE,
        "return (dout - dbias / M - x_hat * (dweight / M))",
        "return (dout - x_hat * (dweight / M))",
        "reference::test_batch_norm_sends_back_nothing_along_1_and_x",
        "layers::test_gradients_agree_with_finite_differences",
    ),
    bug(
        "BatchNorm's running variance is the biased one",
        REFERENCE,
        "(running_var, var * (M / (M - 1)))",
        "(running_var, var)",
        "layers::test_running_statistics_in_closed_form",
    ),
    bug(
        "col2im sets instead of adding",
        REFERENCE,
        "padded[pixels_of_tap(h, w, padded.shape, kernel_size, stride)] += windows",
        "padded[pixels_of_tap(h, w, padded.shape, kernel_size, stride)] = windows",
        "reference::test_im2col_and_col2im_are_adjoint",
    ),
    bug(
        "convolution's weight gradient is that of the last chunk of images",
        REFERENCE,
        "dweight += dweight_part",
        "dweight = dweight_part",
        "reference::test_chunks_of_images_give_what_the_whole_batch_gives",
    ),
    bug(
        "SGD's Nesterov step forgets the gradient",
        REFERENCE,
        "grad = grad + momentum * velocity if nesterov else velocity",
        "grad = momentum * velocity if nesterov else velocity",
        "optim::test_sgd_three_steps_by_hand",
    ),
    bug(
        "muon: the velocity is never slowed down",
        REFERENCE,
        "velocity *= momentum\n        velocity += grad_scale * grad",
        "velocity *= 1\n        velocity += grad_scale * grad",
        "optim::test_muon_replaces_a_share_of_a_filter_and_keeps_its_norm",
    ),
    bug(
        "muon: the gradient is not scaled where it is orthogonalised",
        REFERENCE,
        "orthogonalize((grad_scale * grad + momentum * velocity)",
        "orthogonalize((grad + momentum * velocity)",
        "optim::test_muon_replaces_a_share_of_a_filter_and_keeps_its_norm",
    ),
    bug(
        "Adam's correction lacks the power",
        REFERENCE,
        "param -= (lr / (1 - beta1**step))",
        "param -= (lr / (1 - beta1))",
        "optim::test_adam_moves_by_lr_each_step_on_a_constant_gradient",
    ),
    # cpu.py: the same in pieces
    bug(
        "cpu: the last block of rows is dropped where it is a short one",
        THREADS,
        "for start in range(0, rows, step)]",
        "for start in range(0, max(rows - step + 1, 1), step)]",
        "cpu_kernels::test_batch_norm_equals_its_twin",
        "cpu_kernels::test_the_sum_of_two_gradients_equals_its_twin",
    ),
    bug(
        "cpu: the last chunk of images is dropped where it is a short one",
        THREADS,
        "for start in range(0, N, n)]",
        "for start in range(0, max(N - n + 1, 1), n)]",
        "cpu_kernels::test_convolution_equals_its_twin",
    ),
    bug(
        "cpu: the mean of the blocks' means is not weighted",
        CPU,
        "mean = (counts * means).sum(axis=0) / M",
        "mean = means.mean(axis=0)",
        "cpu_kernels::test_batch_norm_equals_its_twin",
    ),
    bug(
        "cpu: the variance between blocks is forgotten",
        CPU,
        "var = (squares + counts * (means - mean) ** 2).sum(axis=0) / M",
        "var = squares.sum(axis=0) / M",
        "cpu_kernels::test_batch_norm_equals_its_twin",
    ),
    bug(
        "cpu: a folded row is taken apart the wrong way",
        CPU,
        "return np.reshape(rows, (len(rows), -1, C)).sum(axis=1, dtype=np.float64)",
        "return np.reshape(rows, (len(rows), C, -1)).sum(axis=2, dtype=np.float64)",
        "cpu_kernels::test_batch_norm_equals_its_twin",
    ),
    bug(
        "cpu: sums are cut by the number of threads",
        THREADS,
        "size = -(-len(chunks) // GROUPS)",
        "size = -(-len(chunks) // num_threads())",
        "cpu_kernels::test_convolutions_have_the_same_bits_with_any_number_of_threads",
    ),
    bug(
        "cpu: a group's weight gradient is that of its last chunk",
        MEMORY,
        'total += np.matmul(a, b, out=scratch("product", total.shape))',
        "np.matmul(a, b, out=total)",
        "cpu_kernels::test_convolution_equals_its_twin",
    ),
    bug(
        "cpu: the zeros around images are made only once",
        MEMORY,
        "if _mine.framed is not self:  # else the zeros are still there",
        "if _mine.framed is None:",
        "cpu_kernels::test_zeros_around_images_are_there_whatever_was_in_the_memory_before",
    ),
    bug(
        "memory is given out while a result is still in it",
        MEMORY,
        "return np.asarray(_Loan(_take(size))).reshape(shape)",
        "return _Loan(_take(size)).memory.reshape(shape)",
        "cpu_kernels::test_results_stay_as_they_are_through_later_calls",
    ),
    # Winograd
    bug(
        "winograd: a sign in a matrix",
        WINOGRAD,
        "[0, -2, -1, 2, 1, 0]",
        "[0, -2, 1, 2, 1, 0]",
        "winograd::test_winograds_matrices_make_a_filter_of_three_taps",
    ),
    bug(
        "winograd: the window is transposed, not turned by 180 degrees",
        WINOGRAD,
        "weight[::-1, ::-1, part].transpose(0, 1, 3, 2)",
        "weight[:, :, part].transpose(1, 0, 3, 2)",
        "winograd::test_weight_gradient_and_input_gradient_are_adjoint_to_the_convolution",
    ),
    bug(
        "winograd: tiles that reach beyond the image are forgotten",
        WINOGRAD,
        "return -(-size // 4)",
        "return size // 4",
        "cpu_kernels::test_convolution_equals_its_twin",
        "cpu_kernels::test_images_that_tiles_do_not_suit_go_another_way",
    ),
    bug(
        "winograd: one axis of the weight transform loses its signs on the way back",
        WINOGRAD,
        "both = np.ascontiguousarray(np.kron(WEIGHT, WEIGHT).T)",
        "both = np.ascontiguousarray(np.kron(WEIGHT, abs(WEIGHT)).T)",
        "winograd::test_weight_gradient_and_input_gradient_are_adjoint_to_the_convolution",
    ),
    # module.py, layers.py, resnet.py
    bug(
        "layers keep their input in evaluation",
        MODULE,
        "self._cache = cache if self.training else None",
        "self._cache = cache",
        "module::test_nothing_is_kept_in_evaluation",
    ),
    bug(
        "backward can be called twice",
        MODULE,
        "cache, self._cache = self._cache, TAKEN",
        "cache = self._cache",
        "module::test_one_forward_one_backward",
    ),
    bug(
        "Linear sets its gradient instead of adding to it",
        LAYERS,
        "linear_backward(dout, x, self.weight.data)\n        self.weight.grad += dweight",
        "linear_backward(dout, x, self.weight.data)\n        self.weight.grad[...] = dweight",
        "module::test_gradients_add_up",
    ),
    bug(
        "Dropout drops in evaluation",
        LAYERS,
        "if not self.training or self.p == 0:",
        "if self.p == 0:",
        "layers::test_dropout_in_evaluation_is_the_identity",
    ),
    bug(
        "Dropout draws the same mask in each step",
        LAYERS,
        "self.step += 1 ",
        "self.step += 0 ",
        "layers::test_dropout_draws_a_new_mask_each_step_and_the_same_in_each_run",
    ),
    bug(
        "BatchNorm's momentum weighs the past, not the newest batch",
        LAYERS,
        "mean, var, self.momentum, M)",
        "mean, var, 1 - self.momentum, M)",
        "layers::test_running_statistics_in_closed_form",
    ),
    bug(
        "convolutions start without the size of the window in their variance",
        LAYERS,
        "math.sqrt(2 / (kernel_size**2 * in_channels))",
        "math.sqrt(2 / in_channels)",
        "layers::test_convolutions_start_with_the_variance_of_he",
    ),
    bug(
        "the block forgets the gradient of its shortcut",
        RESNET,
        "return kernels_for(dx).add(dx, self.shortcut.backward(dshortcut))",
        "return dx",
        "resnet::test_block_gradients_agree_with_finite_differences",
    ),
    # optim.py
    bug(
        "zero_grad clears an array that no parameter looks at",
        OPTIM,
        "self.grad[...] = 0",
        "self.grad = self.grad * 0",
        "optim::test_zero_grad_clears_in_place",
    ),
    bug(
        "weight decay reaches the vectors",
        OPTIM,
        "weight_decay if decay_vectors or p.data.ndim >= 2 else 0.0",
        "weight_decay",
        "optim::test_vectors_can_be_kept_from_weight_decay",
    ),
    bug(
        "clipping lengthens short gradients",
        OPTIM,
        "self.xp.minimum(max_norm / (norm + 1e-6), 1).astype(self.dtype)",
        "(max_norm / (norm + 1e-6)).astype(self.dtype)",
        "optim::test_long_gradients_are_shortened_to_max_norm",
    ),
    bug(
        "clipping measures the gradient before its scale is taken back",
        OPTIM,
        "self.xp.sqrt(kernels_for(self.grad).sum_of_squares(self.grad)) * grad_scale",
        "self.xp.sqrt(kernels_for(self.grad).sum_of_squares(self.grad))",
        "optim::test_the_gradient_is_multiplied_by_its_scale_before_all_else",
    ),
    bug(
        "the average of the weights has no warm-up",
        OPTIM,
        "decay = min(self.decay, (1 + self.updates) / (10 + self.updates))",
        "decay = self.decay",
        "optim::test_an_average_of_three_steps_by_hand",
    ),
    bug(
        "swapping weights and average loses the weights",
        OPTIM,
        "weights = self.flat.data.copy()",
        "weights = self.flat.data",
        "optim::test_an_average_of_three_steps_by_hand",
    ),
    bug(
        "the triangle begins with a rate of 0",
        SCHEDULES,
        "return lr * ((step + 1) / (peak + 1))",
        "return lr * (step / (peak + 1))",
        "schedules::test_a_triangle_by_hand",
    ),
    # checkpoint.py
    bug(
        "checkpoint: written over the old file",
        STORAGE,
        "part = path.with_name(path.name + PART)",
        "part = path",
        "checkpoint_faults::test_killed_at_each_system_call_of_a_save",
    ),
    bug(
        "checkpoint: takes its name before the disk has it",
        STORAGE,
        "os.fsync(file.fileno())",
        "file.fileno()",
        "checkpoint_faults::test_the_disk_has_a_file_before_the_file_has_its_name",
    ),
    bug(
        "checkpoint: the old weights go before the new ones have their name",
        STORAGE,
        "os.replace(part, path)",
        "path.unlink(missing_ok=True), os.replace(part, path)",
        "checkpoint_faults::test_weights_are_there_after_an_error_at_any_system_call",
    ),
    bug(
        "checkpoint: the previous one is not kept",
        STORAGE,
        "os.replace(path, keep)",
        "path.unlink()",
        "checkpoint_faults::test_the_good_one_survives_the_saves_after_a_damaged_one",
    ),
    bug(
        "checkpoint: a damaged one becomes the previous one",
        CHECKPOINT,
        "os.replace(newest, folder / DAMAGED)",
        "pass",
        "checkpoint_faults::test_the_good_one_survives_the_saves_after_a_damaged_one",
    ),
    bug(
        "checkpoint: the checksum does not cover the names",
        STORAGE,
        "json.dumps([name, array.dtype.str, array.shape])",
        "json.dumps([array.dtype.str, array.shape])",
        "checkpoint_faults::test_each_byte_of_a_checkpoint_flipped",
    ),
    bug(
        "checkpoint: Adam's count of steps is left out",
        CHECKPOINT,
        '[("steps.optimizer", optimizer, "steps")] if hasattr',
        "[] if hasattr",
        "checkpoint::test_all_that_changes_in_training_comes_back",
    ),
    bug(
        "checkpoint: the average's count of updates is left out",
        CHECKPOINT,
        '([("updates.average", average, "updates")] if average else [])',
        "[]",
        "checkpoint::test_all_that_changes_in_training_comes_back",
    ),
    # training
    bug(
        "every batch of an epoch gets the same crops",
        BATCHES,
        "self.transform(self.images[index], index, start)",
        "self.transform(self.images[index], index, 0)",
        "batches::test_two_batches_of_one_image_are_cropped_differently",
    ),
    bug(
        "training goes on with the averaged weights",
        EVALUATION,
        "    finally:\n        average.swap()",
        "    finally:\n        pass",
        "resume::test_averaging_and_validating_leave_the_training_as_it_is",
    ),
    bug(
        "an epoch's loss adds up the means of its batches, and divides by its images",
        RUN,
        "self.sums[0] += loss * len(labels)",
        "self.sums[0] += loss",
        "examples::test_a_run_does_what_a_loop_written_apart_from_it_does",
    ),
    bug(
        "resume: Dropout begins again with the first mask",
        CHECKPOINT,
        "for name, part in model.named_modules() if isinstance(part, Dropout)]",
        "for name, part in [] if isinstance(part, Dropout)]",
        "run::test_stopped_in_any_step_and_run_again_it_ends_with_the_same_bits",
    ),
    bug(
        "resume: the sums of the epoch begin again at 0",
        RUN,
        'position["seen"], position["loss_sum"], position["correct"]',
        'position["seen"], 0, 0',
        "resume::test_stopped_in_any_step",
    ),
    bug(
        "several processes: each normalises by its own variance",
        "minires/training/distributed.py",
        "moments[1] += moments[0] ** 2",
        "pass",
        "distributed::test_three_threads_train_as_one_process",
    ),
    bug(
        "several processes: the sums of BatchNorm's backward are not scaled to the rows at hand",
        "minires/training/distributed.py",
        '.astype("float64")) * self.share(len(x))\n        return tuple',
        '.astype("float64"))\n        return tuple',
        "distributed::test_three_threads_train_as_one_process",
    ),
    bug(
        "several processes: the loss's gradient does not count by images",
        "minires/loss.py",
        "self.ranks.share(len(labels)) if self.ranks else 1",
        "1 / self.ranks.size if self.ranks else 1",
        "distributed::test_three_threads_train_as_one_process",
    ),
    bug(
        "several processes: each draws the dropout of the first",
        "minires/layers.py",
        "draw += (self.ranks.start * math.prod(x.shape[1:]),)",
        "draw += (0,)",
        "distributed::test_three_threads_train_as_one_process",
    ),
    bug(
        "several processes: vectors are left out of the sums of gradients",
        "minires/training/gradients.py",
        "end, parameters = flat.size, set()",
        "end, parameters = flat.vectors_start, set()",
        "distributed::test_gradients_are_on_their_way_before_backward_is_done",
    ),
    bug(
        "resume: the order of the epoch is drawn from a generator that lives on",
        LOOP,
        "np.random.default_rng([args.seed, epoch]).permutation",
        "np.random.permutation",
        "resume::test_stopped_in_any_step",
    ),
    bug(
        "resume: the last batch is done again",
        RUN,
        "batches = batches.skip(done) if",
        "batches = batches.skip(max(done - 1, 0)) if",
        "resume::test_stopped_in_any_step",
    ),
    bug(
        "resume: skipped batches still count as the first positions of the epoch",
        BATCHES,
        "index = self.order[start : start + at_once]",
        "index, start = self.order[start : start + at_once], start - self.first",
        "batches::test_batches_that_are_skipped_change_nothing_in_those_that_follow",
    ),
    bug(
        "resume: the best weights so far are forgotten",
        RUN,
        'self.best, self.history, self.step = part_of(state, "best."),',
        "self.best, self.history, self.step = {},",
        "resume::test_best_weights_that_are_ahead_of_the_checkpoint_are_set_back",
    ),
    bug(
        "resume: the seconds before it do not count",
        RUN,
        'self._started -= position["seconds"]',
        "self._started -= 0",
        "resume::test_the_seconds_of_a_run_are_those_it_has_computed",
    ),
]


def run_tests(project, tests):
    """Run tests in a copy of the project, up to the first that fails.

    Returns     the exit code of pytest (0 all passed, 1 a test failed, others: they did not run), the first line of its
                summary for a test that failed or had an error, and the seconds
    """
    started = time.monotonic()
    # No bytecode: a bug of the same length, planted in the same second, would not be seen
    environment = os.environ | {"PYTHONPATH": str(project), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return None, f"the tests took more than {TIMEOUT} s", time.monotonic() - started
    found = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - |$)", done.stdout, re.MULTILINE)
    last = (done.stdout.strip() or done.stderr.strip()).splitlines()[-1]
    return done.returncode, found[1] if found else last, time.monotonic() - started


def main():
    parser = argparse.ArgumentParser(
        description="Plant bugs in a copy of the project and see whether tests catch them."
    )
    parser.add_argument("names", nargs="*", help="parts of names or files; without any, all bugs")
    parser.add_argument("--list", action="store_true", help="print the bugs and their tests, and plant none")
    args = parser.parse_args()
    names = [name.lower() for name in args.names]
    bugs = [bug for bug in BUGS if not names or any(n in f"{bug.name} {bug.file}".lower() for n in names)]
    if not bugs:
        parser.error(f"no bug has one of these in its name or file: {' '.join(args.names)}")
    if args.list:
        for bug in bugs:
            print(f"{bug.name}\n    {bug.file}: {', '.join(bug.tests)}")
        return 0

    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        project = pathlib.Path(folder, "minires")
        copy_project(project)
        code, line, seconds = run_tests(project, sorted({test for bug in bugs for test in bug.tests}))
        if code != 0:
            print(f"without a bug, the tests have to pass: {line}")
            return 1
        print(f"without a bug: {line}", flush=True)
        for bug in bugs:
            path = project / bug.file
            text = path.read_text("utf-8")
            path.write_text(planted(project, bug), "utf-8")
            code, line, seconds = run_tests(project, bug.tests)
            path.write_text(text, "utf-8")
            verdict = f"caught by {line} ({seconds:.1f} s)" if code == 1 else f"NOT CAUGHT: {line}"
            missed += code != 1
            print(f"{bug.name:75} {verdict}", flush=True)
    print(f"{len(bugs) - missed} of {len(bugs)} bugs caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
