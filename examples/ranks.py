"""What several processes exchange in a training step, how long it takes, and how much of it is hidden.

    python examples/benchmark.py --ranks 2                                speeds: one process, and several
    mpiexec -n 2 python examples/ranks.py examples/timeline.png           the timeline of one step, as a picture

The network, the batch and the optimizer are those of benchmark.py. A sum of gradients is hidden while layers compute;
what is not is the time in which a process does nothing but wait for others, or for MPI.
"""

import argparse
import multiprocessing.connection
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time

import numpy as np

import minires
from minires.kernels import num_threads, set_num_threads
from minires.plots import figure_class
from minires.training import UsageError
from minires.training.arguments import at_least
from minires.training.launch import INSTALL, processes
from minires.training.script import run_script

WARMUP = 2  # steps that are not timed
QUESTIONS = ("stop", "time", "sum_of_gradients")
COLORS = {
    "forward": "#9ecae1",
    "backward": "#4292c6",
    "optimizer": "#cccccc",
    "wait": "#fdae6b",
    "gradients": "#e6550d",
}


class Training:
    """Training steps on one batch, of which each process has its part; with how long it waits for what."""

    def __init__(self, ranks, batch_size, threads=None):
        if threads:
            set_num_threads(threads)
        rng = np.random.default_rng(0)
        part = ranks.part(batch_size)
        self.images = rng.standard_normal((batch_size, 32, 32, 3)).astype(np.float32)[part]
        self.labels = rng.integers(0, 10, batch_size)[part]
        self.model, self.loss_function = minires.ResNet(), minires.SoftmaxCrossEntropy()
        self.optimizer = minires.Adam(self.model.parameters())
        self.ranks = watched(ranks)
        ranks.total = batch_size
        ranks.distribute(self.model, self.optimizer, self.loss_function)

    def step(self):
        self.optimizer.zero_grad()
        loss = self.loss_function(self.model(self.images), self.labels)
        self.model.backward(self.loss_function.backward(), need_dx=False)
        self.optimizer.step()
        return float(loss)

    def time(self, steps):
        """Return the seconds of some steps, and what was exchanged in them: [(kind, begin, end, bytes), ...]."""
        self.ranks.events = []
        begun = time.perf_counter()
        for _ in range(steps):
            self.step()
        return time.perf_counter() - begun, self.ranks.events

    def sum_of_gradients(self, _):
        """Return the seconds that the sum of all gradients takes where nothing hides it."""
        self.ranks.sum(np.zeros(1))  # all begin together
        begun = time.perf_counter()
        self.ranks.sum(self.optimizer.flat.grad)
        return time.perf_counter() - begun


def watched(ranks):
    """Let the sums of `ranks` leave events: "wait" for those of BatchNorm and the loss; "call" for the time that it
    takes to begin a sum of gradients and to let MPI go on with it; "last" for the wait at the end of backward;
    "gradients" from the start of a bucket's sum to when it is seen to be done, hidden or not.
    """
    ranks.events, under_way = [], []

    def timed(kind, function):
        def call(*array):
            begun = time.perf_counter()
            result = function(*array)
            ranks.events.append((kind, begun, time.perf_counter(), array[0].nbytes if array else 0))
            return result

        return call

    def start_sum(array, start=ranks.start_sum if ranks else None):
        begun = time.perf_counter()
        start(array)
        under_way.append((begun, array.nbytes))
        ranks.events.append(("call", begun, time.perf_counter(), 0))

    def progress():
        begun = time.perf_counter()
        ranks.mpi.Request.Testsome(ranks.under_way)  # in place of Testall, which marks none before all are done
        done = [not request for request in ranks.under_way]  # a request that is done has become none
        for i in reversed(range(len(done))):
            if done[i]:
                ranks.under_way.pop(i)
                ranks.events.append(("gradients", under_way[i][0], time.perf_counter(), under_way.pop(i)[1]))
        ranks.events.append(("call", begun, time.perf_counter(), 0))

    def finish_sums(finish=ranks.finish_sums if ranks else None):
        begun = time.perf_counter()
        finish()
        ended = time.perf_counter()
        ranks.events.extend(("gradients", start, ended, size) for start, size in under_way)
        under_way.clear()
        ranks.events.append(("last", begun, ended, 0))

    if ranks:
        ranks.sum = timed("wait", ranks.sum)
        ranks.start_sum, ranks.progress, ranks.finish_sums = start_sum, progress, finish_sums
    return ranks


class Job:
    """Processes that train together when they are asked to, and otherwise sleep."""

    def __init__(self, count, threads, batch_size):
        launch = [find_mpiexec(), "-n", count] if count > 1 else []
        with multiprocessing.connection.Listener() as listener:
            words = ["--serve", listener.address, "--threads", threads, "--batch-size", batch_size]
            command = [str(word) for word in [*launch, sys.executable, __file__, *words]]
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            accepted = []
            threading.Thread(target=lambda: accepted.append(listener.accept()), daemon=True).start()
            while not accepted:
                if self.process.poll() is not None:
                    raise RuntimeError(f"{count} processes have ended with {self.process.returncode} at their start")
                time.sleep(0.05)
            (self.pipe,) = accepted

    def ask(self, question, number=0):
        """Ask for a method of Training, with a number."""
        time.sleep(0.3)  # lets the threads of the one before come to rest
        try:
            self.pipe.send((QUESTIONS.index(question), number))
            return self.pipe.recv()
        except (EOFError, OSError) as error:
            ended = f"the process of a contestant has ended with {self.process.wait()}, perhaps for want of memory"
            raise RuntimeError(ended) from error

    def stop(self):
        self.pipe.send((QUESTIONS.index("stop"), 0))
        self.process.wait()


def find_mpiexec():
    """Return the mpiexec beside Python, or else that of the PATH."""
    beside = os.path.dirname(sys.executable)
    launcher = shutil.which("mpiexec", path=f"{beside}{os.pathsep}{os.environ.get('PATH', '')}")
    if not launcher:
        raise UsageError(f"several processes take an mpiexec, and there is none on the PATH: {INSTALL} brings one")
    return launcher


def serve(ranks, address, threads, batch_size):
    """Answer questions, which rank 0 hears and the others wait for asleep, as waiting for MPI would take a core."""
    pipe = multiprocessing.connection.Client(address) if ranks.rank == 0 else None
    training = Training(ranks, batch_size, threads)
    question = np.zeros(2, np.int64)
    while True:
        if pipe:
            try:
                question[:] = pipe.recv()
            except (EOFError, OSError):  # who asks has ended
                question[:] = QUESTIONS.index("stop"), 0
        if ranks:
            request = ranks.world.Ibcast(question)
            while not request.Test():
                time.sleep(0.01)
        if QUESTIONS[question[0]] == "stop":
            return
        answer = getattr(training, QUESTIONS[question[0]])(int(question[1]))
        if pipe:
            pipe.send(answer)


def compare(count, batch_size, rounds, steps):
    """Print the speeds of one process with all threads, of `count` processes that share them, and of one thread."""
    cores = num_threads()
    kinds = [(1, cores), (count, max(1, cores // count)), (1, 1)]
    names = [f"{ranks} process{'es' * (ranks > 1)} of {n} thread{'s' * (n > 1)}" for ranks, n in kinds]
    jobs = [Job(*kind, batch_size) for kind in kinds]
    for job in jobs:
        job.ask("time", WARMUP)
    answers = [[job.ask("time", steps) for job in jobs] for _ in range(rounds)]
    print(f"\n{'training':<26} {'images/s':>9} {'from':>7} {'to':>7}   times as fast as {names[0]}")
    for i, name in enumerate(names):
        speeds = sorted(batch_size * steps / answer[i][0] for answer in answers)
        ratios = sorted(answer[0][0] / answer[i][0] for answer in answers)
        ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})" if i else ""
        print(f"{name:<26} {statistics.median(speeds):9.1f} {speeds[0]:7.1f} {speeds[-1]:7.1f}   {ratio}")
    alone = statistics.median(jobs[1].ask("sum_of_gradients") for _ in range(5 * rounds))
    print_exchanges([answer[1] for answer in answers], steps, alone)
    for job in jobs:
        job.stop()


def print_exchanges(answers, steps, alone):
    """Say what rank 0 exchanged in a step: medians over the rounds."""

    def median(kinds, value):
        return statistics.median(
            sum(value(*event) for event in events if event[0] in kinds) / steps for _, events in answers
        )

    def milliseconds(kind, begin, end, size):
        return 1000 * (end - begin)

    def size_of(kind, begin, end, size):
        return size / 1e6

    seconds = statistics.median(time for time, _ in answers) / steps
    visible = median(("call", "last"), milliseconds)
    print(
        f"\na step of {1000 * seconds:.0f} ms exchanges\n"
        f"  gradients               {median(['gradients'], size_of):7.2f} MB in "
        f"{median(['gradients'], lambda *_: 1):.0f} sums: {1000 * alone:.1f} ms where nothing hides them, "
        f"{visible:.1f} ms of the step\n"
        f"  BatchNorm and the loss  {median(['wait'], size_of):7.2f} MB in {median(['wait'], lambda *_: 1):.0f} sums: "
        f"{median(['wait'], milliseconds):.1f} ms of the step, waiting for the other processes among them"
    )


def trace(ranks, batch_size, threads, path):
    """Draw one step: what each process computes, what it waits for, and which gradients are on their way."""
    training = Training(ranks, batch_size, threads)
    training.time(WARMUP)
    spans, model = [], training.model
    leaves = [part for part in model.modules() if not list(part.named_children())]
    for layer in leaves:
        for way in ("forward", "backward"):
            setattr(layer, way, timed_layer(getattr(layer, way), way, spans))
    begun = ranks.gather(time.perf_counter())[0]
    _, events = training.time(1)
    ended = time.perf_counter()
    last = max(end for kind, _, end, _ in events if kind == "last")
    spans += [("optimizer", last, ended)]
    spans += [("wait" if kind == "last" else kind, begin, end) for kind, begin, end, _ in events if kind != "call"]
    everything = ranks.gather([(kind, 1000 * (begin - begun), 1000 * (end - begun)) for kind, begin, end in spans])
    if ranks.rank == 0:
        draw(everything, path)
        print(f"{path}: a step of {max(end for spans in everything for _, _, end in spans):.0f} ms", flush=True)


def timed_layer(method, way, spans):
    def call(*args, **kwargs):
        begun = time.perf_counter()
        result = method(*args, **kwargs)
        spans.append((way, begun, time.perf_counter()))
        return result

    return call


def draw(everything, path):
    figure = figure_class()(figsize=(11, 0.9 + 1.1 * len(everything)), layout="constrained")
    axes = figure.subplots()
    labels = {
        "forward": "forward",
        "backward": "backward",
        "wait": "waits for a sum",
        "gradients": "a sum of gradients is on its way",
        "optimizer": "optimizer",
    }
    for rank, spans in enumerate(everything):
        for kind in ("forward", "backward", "optimizer", "wait", "gradients"):
            bars = [(begin, end - begin) for name, begin, end in spans if name == kind]
            below = kind == "gradients"
            row = (-rank - 0.42, 0.22) if below else (-rank - 0.15, 0.5)
            label = labels[kind] if rank == 0 else None
            style = {"edgecolor": "white", "linewidth": 0.3, "alpha": 0.75 if below else 1.0}
            axes.broken_barh(bars, row, facecolors=COLORS[kind], label=label, **style)
    axes.set_yticks([-rank for rank in range(len(everything))], [f"rank {rank}" for rank in range(len(everything))])
    axes.set_xlabel("milliseconds")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.25), ncols=5, frameon=False, fontsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None} if str(path).endswith("svg") else None, dpi=110)


def main():
    ranks = processes()
    parser = argparse.ArgumentParser(description="Draw the timeline of one training step.", allow_abbrev=False)
    parser.add_argument("picture", nargs="?", default="timeline.svg")
    parser.add_argument(
        "--batch-size", type=at_least(1), default=128, metavar="N", help="of all processes, default 128"
    )
    parser.add_argument("--threads", type=at_least(1), metavar="N", help="of each, default its share of the cores")
    parser.add_argument("--serve", help=argparse.SUPPRESS)  # for benchmark.py
    args = parser.parse_args()
    if args.serve:
        return serve(ranks, args.serve, args.threads, args.batch_size)
    if not ranks:
        raise UsageError("a timeline is that of several processes: mpiexec -n 2 python examples/ranks.py")
    try:
        figure_class()
    except ImportError as error:
        raise UsageError(str(error)) from error
    return trace(ranks, args.batch_size, args.threads, args.picture)


if __name__ == "__main__":
    run_script(main, processes)
