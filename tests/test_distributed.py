"""Several processes train as one does: the same weights up to rounding, the same bits in all, and one end for all.

Ranks are threads in some tests, and processes under mpiexec in those that need mpi4py.
"""

import copy
import ctypes
import importlib.util
import inspect
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest
from conftest import relative_error
from kill_and_resume import content
from shared_steps import STEPS, VARIANTS, train
from threaded_mpi import run_ranks

import minires
from minires.batches import Batches
from minires.kernels import reference
from minires.training import Run, distributed, launch
from minires.training.distributed import OneProcess, RanksDifferError
from minires.training.folder import UsageError
from minires.training.gradients import GradientSums
from minires.training.nccl import NCCL

ROOT = pathlib.Path(__file__).parent.parent
SMALL = ["--data", "sample", "--channels", "4", "4", "4", "4", "--blocks", "1", "1", "1", "1", "--batch-size", "6"]
TINY = [*SMALL, "--limit-batches", "5", "--epochs", "2", "--device", "cpu", "--recipe", "fast", "--no-full-train"]
LIMIT = 1e-12
SECONDS = 120  # after which a job that hangs has failed

try:
    import mpi4py.MPI  # noqa: F401

    MPIEXEC = shutil.which("mpiexec", path=f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    WHY = None if MPIEXEC else "there is no mpiexec"
except (ImportError, RuntimeError) as error:
    WHY = f'{error}; pip install -e ".[mpi]" brings mpi4py and mpiexec'
mpi = pytest.mark.skipif(WHY is not None, reason=str(WHY))


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("MINIRES_NUM_THREADS", "1")  # ranks that are threads would set it for all


def start(ranks, *words, pictures=False):
    path = [ROOT, ROOT / "tests"] if pictures else [ROOT / "tests" / "without_pictures", ROOT, ROOT / "tests"]
    environment = {**os.environ, "PYTHONPATH": ":".join(map(str, path))}
    command = [MPIEXEC, "-n", str(ranks), sys.executable, *map(str, words)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    )


def finish(process):
    """Return the exit code, the output and the errors of a job; one that hangs fails."""
    try:
        out, err = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        raise
    return process.returncode, out, err


def job(ranks, *words):
    return finish(start(ranks, *words))


def code_job(ranks, code):
    return job(ranks, "-c", f"from minires.training.launch import processes\nranks = processes()\n{code}")


def weights(run):
    """All numbers of a run's model, end to end."""
    arrays = [run[name] for name in sorted(run) if ": model." in name]
    return np.concatenate([np.frombuffer(data, dtype) for dtype, _, data in arrays])


def differences(found, expected):
    assert found.keys() == expected.keys()
    return {name: relative_error(found[name], expected[name]) for name in expected}


# Ranks that are threads


@pytest.mark.parametrize("count", [1, 2, 3])
def test_parts_are_even_and_together_the_whole(count):
    ranks = OneProcess()
    ranks.size = count
    for total in range(9):
        parts = []
        for ranks.rank in range(count):
            part = ranks.part(total)
            parts.append(list(range(total))[part])
        assert [i for part in parts for i in part] == list(range(total))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("start", range(9))
def test_a_part_of_a_mask_is_that_of_the_whole(start):
    x = np.ones((4, 5))
    whole = reference.dropout_forward(x, 0.4, 17, 3).reshape(-1)
    part = reference.dropout_forward(np.ones(7), 0.4, 17, 3, start)
    assert (part == whole[start : start + 7]).all()
    assert (reference.dropout_backward(np.ones(7), 0.4, 17, 3, start) == part).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_three_threads_train_as_one_process(variant):
    results = run_ranks(3, lambda ranks: train(ranks, **VARIANTS[variant]))
    errors = differences(results[0], train(OneProcess(), **VARIANTS[variant]))
    assert max(errors.values()) < LIMIT, errors
    for other in results[1:]:
        assert all((other[name] == results[0][name]).all() for name in other)


def test_in_float32_threads_differ_as_other_chunks_do():
    results = run_ranks(2, lambda ranks: train(ranks, "float32", momentum=0.9))
    errors = differences(results[0], train(OneProcess(), "float32", momentum=0.9))
    assert 0 < max(errors.values()) < 1e-3


def test_local_batch_norm_is_another_training_that_all_share():
    results = run_ranks(2, lambda ranks: train(ranks, local=True))
    errors = differences(results[0], train(OneProcess()))
    assert errors["model.linear.weight"] > 1e-3
    for name in results[0]:
        if "running" not in name or name.startswith("evaluated"):
            assert (results[0][name] == results[1][name]).all(), name


def test_a_batch_that_was_not_cut_by_ranks_is_refused():
    def wrong(ranks):
        model, loss = minires.ResNet((1,), (4,)), minires.SoftmaxCrossEntropy()
        ranks.distribute(model, minires.SGD(model.parameters(), 0.1), loss)
        ranks.total = 7
        return model(np.zeros((5, 8, 8, 3), np.float32))

    with pytest.raises(
        RuntimeError, match=r"has 5 images of a batch of 7: take batches from Batches\(\.\.\., ranks=ra"
    ):
        run_ranks(2, wrong)


def test_a_model_that_is_trained_together_is_not_copied():
    """The copy's backward would be that of the first."""

    def copy_it(ranks):
        model = minires.ResNet((1,), (4,))
        ranks.distribute(model, minires.SGD(model.parameters(), 0.1), minires.SoftmaxCrossEntropy())
        return copy.deepcopy(model)

    with pytest.raises(TypeError, match=r"cannot be copied: load its state_dict\(\) into another one"):
        run_ranks(2, copy_it)


def test_ranks_that_differ_are_named_with_the_layer():
    def differ(ranks):
        model = minires.ResNet((1,), (4,), seed=0)
        ranks.check_same(model.state_dict(), "epoch 1")
        if ranks.rank == 1:
            model.layer1.layers()[0].conv2.weight.data[0, 0, 0, 0] += 1e-7
        ranks.check_same(model.state_dict(), "epoch 2")

    with pytest.raises(
        RanksDifferError, match=r"after epoch 2, rank 1 \(on here\) .* the first in layer1\.0\.conv2\.weight"
    ):
        run_ranks(3, differ)


def test_a_run_finds_ranks_that_differ_after_its_first_step(tmp_path):
    def differ(ranks):
        model, loss_function = minires.ResNet((1,), (4,), seed=0), minires.SoftmaxCrossEntropy()
        optimizer = minires.SGD(model.parameters(), 0.1)
        ranks.distribute(model, optimizer, loss_function)
        model.conv1.weight.data[...] *= 1 + ranks.rank
        batches = Batches(np.ones((8, 8, 8, 3), np.float32), np.zeros(8, int), np.arange(8), 4, ranks=ranks)
        with Run(tmp_path / "run", ranks=ranks) as run:
            run.track(model, optimizer, epochs=1, steps_per_epoch=2)
            for _ in run.epochs():
                for images, labels in run.steps(batches):
                    loss_function(model(images), labels)
                    model.backward(loss_function.backward())
                    optimizer.step()

    with pytest.raises(RanksDifferError, match=r"after step 1, rank 1 .* its processor is of another kind"):
        run_ranks(2, differ)


def test_an_error_of_the_first_rank_is_raised_in_all():
    def fail(ranks):
        def refuse():
            raise UsageError(f"rank {ranks.rank} refuses")

        with pytest.raises(UsageError, match="rank 0 refuses"):
            ranks.first(refuse)
        return ranks.first(lambda: f"of rank {ranks.rank}")

    assert run_ranks(3, fail) == ["of rank 0"] * 3


def test_gradients_are_on_their_way_before_backward_is_done(rng):
    """Every number once, the last layers first, and those of the last stage while others are still to come."""
    model = minires.ResNet((1, 1, 1, 1))
    flat = minires.SGD(model.parameters(), 0.1).flat
    events = []

    class Recorder(OneProcess):
        def start_sum(self, array):
            start = (array.__array_interface__["data"][0] - flat.grad.__array_interface__["data"][0]) // 4
            events.append((start, start + array.size))

        def progress(self):
            events.append("a layer is done")

        def finish_sums(self):
            events.append("wait")

    GradientSums(Recorder(), model, flat)
    for _ in range(2):
        events.clear()
        out = model(rng.standard_normal((2, 8, 8, 3)).astype(np.float32))
        model.backward(np.ones_like(out))
        parts = [event for event in events if isinstance(event, tuple)]
        ends = [0]
        for begin, end in sorted(parts):
            assert begin == ends[-1]
            ends.append(end)
        assert ends[-1] == flat.size
        assert events[-1] == "wait"
        last_stage = flat.offsets[[p is model.layer4.layers()[0].conv1.weight for p in flat.params].index(True)]
        sent = next(i for i, event in enumerate(events) if event in parts and event[0] <= last_stage < event[1])
        assert events[sent:].count("a layer is done") > 15


def test_batches_of_parts_are_those_of_one_process_and_can_be_skipped():
    images, labels = np.arange(23 * 4).reshape(23, 2, 2, 1), np.arange(23)
    order = np.random.default_rng(0).permutation(23)

    def transform(images, index, start):
        return images + 1000 * np.arange(start, start + len(images))[:, None, None, None]

    def parts(ranks):
        return [(x, y, ranks.total) for x, y in Batches(images, labels, order, 7, transform, ranks).skip(1)]

    found = run_ranks(3, parts)
    expected = list(Batches(images, labels, order, 7, transform).skip(1))
    for i, (x, y) in enumerate(expected):
        assert (np.concatenate([rank[i][0] for rank in found]) == x).all()
        assert (np.concatenate([rank[i][1] for rank in found]) == y).all()
        assert [rank[i][2] for rank in found] == [len(y)] * 3


# What is told of it


def test_the_model_of_scaling_is_one_alone_and_falls_with_the_number_of_processes():
    import scaling

    assert scaling.network()[0] == 4 * 4_977_226
    assert len(scaling.network()[1]) == 28
    for machine in scaling.MACHINES:
        for batch in (128, 8192):
            weak = [scaling.efficiency(machine, n, batch, batch) for n in scaling.PROCESSES]
            strong = [scaling.efficiency(machine, n, batch / n, batch) for n in scaling.PROCESSES]
            for row in (weak, strong):
                assert row[0] == 1
                assert row == sorted(row, reverse=True)
            assert strong < weak
    *_, shared, local = scaling.MACHINES
    assert scaling.efficiency(local, 64, 128, 128) > scaling.efficiency(shared, 64, 128, 128)


def test_the_timeline_needs_several_processes():
    done = subprocess.run([sys.executable, str(ROOT / "examples" / "ranks.py")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: a timeline is that of several processes: mpiexec -n 2 python examples/ranks.py\n"


@mpi
def test_the_timeline_asks_for_matplotlib_before_it_measures(tmp_path):
    code, out, err = job(2, ROOT / "examples" / "ranks.py", tmp_path / "timeline.svg")
    assert (code, out, err) == (2, "", "error: hidden\n")  # as tests/without_pictures says it


@mpi
@pytest.mark.slow
def test_the_benchmark_compares_processes_and_a_picture_shows_a_step(tmp_path):
    words = ["--ranks", "2", "--rounds", "1", "--steps", "1", "--batch-size", "4"]
    command = [sys.executable, str(ROOT / "examples" / "benchmark.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^2 processes of 1 thread +\d+\.\d .* \(\d\.\d\d to \d\.\d\d\)$", done.stdout, re.MULTILINE)
    assert re.search(r"gradients +19\.91 MB in 7 sums: \d+\.\d ms where nothing hides them", done.stdout)
    assert re.search(r"BatchNorm and the loss +0\.10 MB in 29 sums", done.stdout)
    if not importlib.util.find_spec("matplotlib"):
        pytest.skip("matplotlib is not installed")
    words = [ROOT / "examples" / "ranks.py", tmp_path / "timeline.svg", "--batch-size", "4"]
    code, out, err = finish(start(2, *words, pictures=True))
    assert code == 0, err
    assert out.startswith(f"{tmp_path / 'timeline.svg'}: a step of ")
    assert "a sum of gradients is on its way" in (tmp_path / "timeline.svg").read_text()


# NCCL, on arrays that refuse to mix with NumPy's


# CuPy 14.2's own words, from the first lines of its docstrings
NCCL_SIGNATURES = {
    "__init__": "NcclCommunicator(int ndev, bytes commId, int rank, NcclConfig config=None)",
    "allReduce": "NcclCommunicator.allReduce(self, intptr_t sendbuf, intptr_t recvbuf, size_t count, int datatype, "
    "int op, intptr_t stream)",
}


def test_the_signatures_of_nccl_are_those_of_the_installed_cupy():
    nccl = pytest.importorskip("cupy.cuda.nccl", reason='pip install -e ".[nccl]" brings CuPy with NCCL')
    if not nccl.available:
        pytest.skip('pip install -e ".[nccl]" brings NCCL')
    assert nccl.NcclCommunicator.__doc__.splitlines()[0] == NCCL_SIGNATURES["__init__"]
    assert nccl.NcclCommunicator.allReduce.__doc__.splitlines()[0] == NCCL_SIGNATURES["allReduce"]
    assert {"NCCL_FLOAT32", "NCCL_FLOAT64", "NCCL_SUM"} <= set(dir(nccl))
    assert isinstance(nccl.get_unique_id(), bytes | tuple)


class Streams:
    """Of each thread's GPU: what was asked of which stream, in order."""

    def __init__(self):
        self.log, self.ptr = [], 1

    def wait_event(self, event):
        self.log.append(("wait", event))

    def record(self):
        self.log.append(("record", event := object()))
        return event


@pytest.fixture
def strict_nccl(strict_gpu, monkeypatch):
    """CuPy's NCCL for ranks that are threads, with GPUs of StrictArrays: it adds where the addresses point."""
    here = threading.local()

    class Communicator:
        def __init__(self, *arguments):
            inspect.Signature([parameter(p) for p in ("ndev", "commId", "rank")]).bind(*arguments)
            self.count, self.identity, self.rank = arguments
            assert self.identity == "the id of rank 0"

        def allReduce(self, *arguments):  # noqa: N802
            names = re.findall(r"(\w+)[,)]", NCCL_SIGNATURES["allReduce"])[1:]
            given = inspect.Signature([parameter(name) for name in names]).bind(*arguments).arguments
            assert all(type(value) is int for value in given.values())
            assert given["sendbuf"] == given["recvbuf"]
            number = {7: ctypes.c_float, 8: ctypes.c_double}[given["datatype"]]
            array = np.ctypeslib.as_array((number * given["count"]).from_address(given["recvbuf"]))
            here.ranks.world.Allreduce(None, array)
            streams = {stream.ptr: stream for stream in (here.main, here.beside)}
            streams[given["stream"]].log.append(("sum", given["count"]))

    def parameter(name):
        return inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY)

    def stream(non_blocking):
        assert non_blocking
        here.beside = Streams()
        here.beside.ptr = 2
        return here.beside

    nccl = types.SimpleNamespace(
        NcclCommunicator=Communicator,
        get_unique_id=lambda: f"the id of rank {here.ranks.rank}",
        NCCL_FLOAT32=7,
        NCCL_FLOAT64=8,
        NCCL_SUM=0,
    )
    monkeypatch.setitem(sys.modules, f"{strict_gpu.__name__}.cuda.nccl", nccl)
    cuda = types.SimpleNamespace(Stream=stream, get_current_stream=lambda: here.main)
    cuda.Device = lambda: types.SimpleNamespace(pci_bus_id=here.gpu)
    cuda.runtime = types.SimpleNamespace(getDeviceCount=lambda: 1)
    monkeypatch.setattr(strict_gpu, "cuda", cuda, raising=False)

    def on_gpus(function, share=False):
        def work(ranks):
            here.ranks, here.main, here.gpu = ranks, Streams(), 0 if share else ranks.rank
            ranks.nccl = NCCL(ranks)
            return function(ranks, here)

        return run_ranks(2, work)

    return on_gpus


def test_two_ranks_on_nccl_train_as_one_process(strict_nccl):
    """Forward, backward, loss, statistics and the step, on arrays that no host array may touch."""
    logs = []

    def on_device(ranks, here):
        found = train(ranks, adam=True, lr=1e-3, dropout=0.4, device="gpu")
        logs.append((here.main.log, here.beside.log))
        return found

    results = strict_nccl(on_device)
    expected = train(OneProcess(), adam=True, lr=1e-3, dropout=0.4)
    assert max(differences(results[0], expected).values()) < LIMIT
    assert all((results[0][name] == results[1][name]).all() for name in expected)
    for main, beside in logs:
        kinds = [kind for kind, _ in beside]
        assert kinds[:2] == ["wait", "sum"]  # a bucket waits for its gradients
        recorded = {event for kind, event in main + beside if kind == "record"}
        assert all(event in recorded for kind, event in main + beside if kind == "wait")
        assert [kind for kind, _ in main].count("wait") == STEPS  # the optimizer waits for the buckets, once a step
        assert [kind for kind, _ in main].count(
            "sum"
        ) > STEPS  # BatchNorm and the loss, in the order of the computation


def test_more_processes_than_gpus_are_refused(strict_nccl):
    with pytest.raises(
        UsageError, match="more processes than GPUs on here: start at most 1 there, or add --device cpu"
    ):
        strict_nccl(lambda ranks, here: None, share=True)


@mpi
@pytest.mark.gpu
def test_a_run_on_nccl_with_one_rank_is_that_without(tmp_path):
    """The step stays a recorded one, and a sum over one process changes nothing but for the order of two roundings."""
    script = [sys.executable, str(ROOT / "examples" / "train_cifar.py"), "--data", "sample", "--epochs", "2"]
    found = {}
    for name, flags in (("alone", []), ("nccl", ["--distributed"])):
        command = [*script, "--device", "gpu", "--batch-size", "100", "--out", str(tmp_path / name), *flags]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        assert done.returncode == 0, done.stderr
        found[name] = content(tmp_path / name)
    losses = [[float(row["train_loss"]) for row in found[name]["log.csv"]] for name in found]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


# Starting


@pytest.mark.parametrize(("size", "rank"), launch.LAUNCHERS)
def test_several_processes_without_mpi4py_are_told_once(monkeypatch, size, rank):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    monkeypatch.setenv(size, "3")
    monkeypatch.setenv(rank, "0")
    with pytest.raises(UsageError, match=rf'{size} asks for .* takes mpi4py \(.*\): pip install -e "\.\[mpi\]"'):
        launch.processes()
    monkeypatch.setenv(rank, "1")
    with pytest.raises(SystemExit, match="2"):
        launch.processes()


def test_a_single_process_asks_for_no_mpi(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    for size, _ in launch.LAUNCHERS:
        monkeypatch.delenv(size, raising=False)
    assert type(launch.processes()) is OneProcess
    for one in ("1", "", "none"):
        monkeypatch.setenv("PMI_SIZE", one)
        assert type(launch.processes()) is OneProcess
    with pytest.raises(UsageError, match="mpi4py"):
        launch.processes(distributed=True)


# Under mpiexec


@pytest.fixture(scope="session", params=[2, 3])
def trained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    code, _, err = job(request.param, ROOT / "tests" / "shared_steps.py", folder)
    assert code == 0, err
    return folder


@mpi
@pytest.mark.parametrize("variant", VARIANTS)
def test_processes_train_as_one_does(trained, variant):
    errors = differences(dict(np.load(trained / f"{variant}.npz")), train(OneProcess(), **VARIANTS[variant]))
    assert max(errors.values()) < LIMIT, errors


@mpi
def test_sums_are_the_same_bits_in_all_processes_and_each_time(trained):
    assert (trained / "digest").read_text() == (trained / "digest of the second time").read_text()


@mpi
@pytest.mark.slow
def test_a_run_of_processes_is_that_of_one_and_can_be_resumed(tmp_path):
    """The same number gives the same bits, also when it was stopped; another number gives other last digits."""
    script = ROOT / "examples" / "train_cifar.py"
    runs = {}
    for name, ranks in (("one", 1), ("two", 2), ("two again", 2), ("three", 3)):
        code, out, err = job(ranks, script, *TINY, "--out", tmp_path / name)
        assert code == 0, err
        runs[name] = content(tmp_path / name)
        assert out.count("test loss") == 1
    assert runs["two"] == runs["two again"] != runs["one"]
    expected_loss = float(runs["one"]["log.csv"][0]["train_loss"])
    for name in ("two", "three"):  # rounding alone, of 1e-6; where it carries a number across a ReLU's 0, of 1e-2
        assert float(runs[name]["log.csv"][0]["train_loss"]) == pytest.approx(expected_loss, rel=1e-5)
        assert relative_error(weights(runs[name]), weights(runs["one"])) < 0.05
    for ranks, same in ((2, "two"), (3, None)):
        folder = tmp_path / f"stopped {ranks}"
        process = start(2, script, *TINY, "--out", folder)
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        code, out, err = finish(process)
        assert code == 143, err
        assert err.count("ending after this step") == 1
        command = re.search(r"to resume:\n    mpiexec -n 2 (.*)", out)[1]
        assert command.endswith(f"--resume {folder}") or command.endswith(f"--resume '{folder}'")
        code, out, err = job(ranks, script, "--resume", folder)
        assert code == 0, err
        assert ("processes 2 then, 3 now" in err) == (ranks == 3)
        assert content(folder).keys() == runs["two"].keys()
        assert (content(folder) == runs["two"]) == (same == "two")
        assert json.loads((folder / "config.json").read_text())["processes"] == 2


@mpi
@pytest.mark.parametrize(
    ("raised", "line"),
    [
        ("MemoryError('no room')", "error: rank 1: out of memory: no room"),
        ("ValueError('odd')", "error: rank 1: ValueError: odd (--debug shows the place)"),
        ("SystemExit(7)", "error: rank 1: exit code 7"),
    ],
)
def test_an_error_in_one_process_ends_all_with_a_line_that_names_it(raised, line):
    begun = time.monotonic()
    code, _, err = code_job(
        3,
        "import numpy as np\nfrom minires.training.script import run_script\n"
        f"def main():\n    if ranks.rank == 1: raise {raised}\n    ranks.sum(np.zeros(3))\n"
        "run_script(main, processes)",
    )
    assert code == (7 if "Exit" in raised else 1)
    assert line in err.splitlines()
    assert err.count("error: ") == 1
    assert time.monotonic() - begun < SECONDS / 2


@mpi
def test_an_error_that_nobody_catches_ends_all():
    code, _, err = code_job(2, "import numpy as np\nif ranks.rank: raise ValueError('odd')\nranks.sum(np.zeros(3))")
    assert code == 1
    assert "error: rank 1: ValueError: odd" in err.splitlines()


@mpi
def test_an_error_of_all_processes_is_one_line():
    code, out, err = job(3, ROOT / "examples" / "train_cifar.py", *TINY, "--out", "/")
    assert code == 2
    assert err.count("error:") == 1
    assert "rank" not in err
    assert out == ""
    code, _, err = job(3, ROOT / "examples" / "train_cifar.py", "--epochs", "none")
    assert code == 2
    assert err.count("usage:") == 1


@mpi
def test_a_batch_too_small_for_local_statistics_is_told_before_the_run_begins(tmp_path):
    flags = [*TINY, "--local-batch-norm", "--out", tmp_path / "run"]
    code, out, err = job(3, ROOT / "examples" / "train_cifar.py", *flags, "--batch-size", "2")
    assert (code, out) == (2, "")
    assert "for each of the 3 processes, and the smallest has 2: start fewer" in err
    assert not (tmp_path / "run").exists()
    code, _, err = job(2, ROOT / "examples" / "train_cifar.py", *flags, "--batch-size", "2")
    assert code == 0, err


@mpi
def test_a_number_that_is_not_finite_names_layer_and_rank(tmp_path):
    code, _, err = code_job(
        2,
        "import numpy as np, minires\nfrom minires.training import Run\n"
        "from minires.training.script import run_script\n"
        "def main():\n"
        "    model, loss_function = minires.ResNet((1,), (4,)), minires.SoftmaxCrossEntropy()\n"
        "    optimizer = minires.SGD(model.parameters(), 0.1)\n"
        "    images = np.ones((8, 8, 8, 3), np.float32)\n"
        "    images[6] = np.nan\n"  # which rank 1 has
        f"    with Run({str(tmp_path / 'run')!r}, ranks=ranks) as run:\n"
        "        run.track(model, optimizer, epochs=1, steps_per_epoch=1)\n"
        "        ranks.distribute(model, optimizer, loss_function)\n"
        "        batches = minires.Batches(images, np.zeros(8, int), np.arange(8), 8, ranks=ranks)\n"
        "        for epoch in run.epochs():\n"
        "            for x, y in run.steps(batches):\n"
        "                loss = loss_function(model(x), y)\n"
        "                run.check(loss)\n"
        "import warnings; warnings.simplefilter('ignore')\n"
        "run_script(main, processes)",
    )
    assert code == 1
    assert "the first number that is not finite is in the output of conv1 of rank 1" in err
    assert err.count("error:") == 1


def test_ranks_share_the_cores_that_they_are_bound_to(monkeypatch):
    """Two on each of two sockets; all four on the whole machine, where the system tells nothing."""
    threads, given = [], []

    def socket(_):
        if threading.get_ident() not in threads:
            threads.append(threading.get_ident())
        first = 4 * (threads.index(threading.get_ident()) // 2)
        return {first, first + 1, first + 2, first + 3}

    monkeypatch.delenv("MINIRES_NUM_THREADS")
    monkeypatch.setattr(distributed, "num_threads", lambda: 4)
    monkeypatch.setattr(distributed, "set_num_threads", given.append)
    monkeypatch.setattr(os, "sched_getaffinity", socket, raising=False)
    run_ranks(4, lambda ranks: None)
    monkeypatch.delattr(os, "sched_getaffinity")
    run_ranks(4, lambda ranks: None)
    assert given == [2] * 4 + [1] * 4


@mpi
def test_ranks_on_one_machine_share_its_cores(monkeypatch):
    monkeypatch.delenv("MINIRES_NUM_THREADS")
    code, out, err = code_job(2, "import minires.kernels as k\nprint(ranks.gather(k.num_threads()))")
    assert code == 0, err
    each = max(1, len(os.sched_getaffinity(0)) // 2)
    assert out == f"[{each}, {each}]\n"


@mpi
def test_another_launcher_than_that_of_mpi4py_is_told(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "0")
    command = [sys.executable, str(ROOT / "examples" / "train_cifar.py"), *TINY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 2
    assert re.fullmatch(
        r"error: by SLURM_STEP_NUM_TASKS this is one of 4 processes, but mpi4py's MPI \(.*\) sees 1: start them by .*, "
        r"or unset SLURM_STEP_NUM_TASKS to train in one process\n",
        done.stderr,
    )


@mpi
def test_what_another_launcher_has_left_in_the_environment_does_not_count(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")  # of srun --pty, in which mpiexec was called
    code, out, err = code_job(2, "print(ranks.size)")
    assert (code, out) == (0, "2\n"), err


@mpi
def test_all_processes_can_say_what_an_encoding_lacks(monkeypatch):
    for name, value in (("LC_ALL", "C"), ("PYTHONUTF8", "0"), ("PYTHONCOERCECLOCALE", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONIOENCODING", "ascii:backslashreplace")  # of rank 0; the others write into nowhere
    code, out, err = code_job(2, "print(chr(252), chr(0xdcc3), flush=True)\nranks.gather(0)")
    assert (code, out) == (0, "\\xfc \\udcc3\n"), err


@mpi
@pytest.mark.full
def test_a_random_process_is_killed_at_random_moments_and_the_run_resumed(tmp_path, rng):
    """30 of 30: the job ends within seconds, nobody is left, and the resumed run has the bits of one never killed."""
    script = ROOT / "examples" / "train_cifar.py"
    began = time.monotonic()
    assert job(2, script, *TINY, "--out", tmp_path / "whole", "--checkpoint-every", "0.002")[0] == 0
    whole, seconds = content(tmp_path / "whole"), time.monotonic() - began
    for i in range(30):
        folder = tmp_path / str(i)
        process = start(2, script, *TINY, "--out", folder, "--checkpoint-every", "0.002")
        line = process.stdout.readline()
        pids = [int(pid) for pid in re.search(r"processes ([\d, ]+)", line)[1].split(",")]
        time.sleep(rng.uniform(0, 0.6 * seconds))
        killed = pids[rng.integers(2)]
        try:
            os.kill(killed, signal.SIGKILL)
        except ProcessLookupError:
            assert finish(process)[0] == 0  # it had ended
        else:
            began = time.monotonic()
            code, out, err = finish(process)
            assert code in (0, 9, 137), err
            assert time.monotonic() - began < 10
            # MPICH says it, of the process that was killed or of the one that it has killed itself thereupon
            assert code == 0 or any(f"PID {pid} " in out + err for pid in pids)
        for pid in pids:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
        code, _, err = job(2, script, "--resume", folder)
        assert code == 0, err
        assert content(folder) == whole
