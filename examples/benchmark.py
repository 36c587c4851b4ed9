"""How fast is minires on this machine, next to PyTorch, and where does its time go?

    python examples/benchmark.py                        minires, and PyTorch where it is installed
    python examples/benchmark.py --compile              torch.compile as well (takes a minute to compile)
    python examples/benchmark.py --layers               the milliseconds of each layer, beside what the machine allows
    python examples/benchmark.py --ranks 2              one process with all threads beside two that share them
    python examples/benchmark.py --device gpu           training steps on a GPU, in three precisions and batch sizes
    python examples/benchmark.py --device gpu --layers  the milliseconds of each kernel there

Each contestant lives in a process of its own and takes turns with the others, round after round: a few training steps
each, and when these rounds are over, a few batches of evaluation each. A machine that slows down slows all of them, so
it is the ratios within a round that count. The network, the batch and the optimizer (Adam) are the same, in float32,
with as many threads as the process may use cores. PyTorch runs channels-last, which is its faster layout here.

Peak memory is that of the whole process after training, interpreter and libraries included.
"""

import argparse
import contextlib
import importlib.util
import multiprocessing
import pathlib
import platform
import signal
import statistics
import sys
import time

import numpy as np

import minires
from minires.backend import gpu_library
from minires.kernels import gpu, num_threads
from minires.kernels.threads import run
from minires.summary import output_shapes, parts_first
from minires.training.arguments import at_least
from minires.training.script import run_script

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # for recipes.py, also under python -m and PYTHONSAFEPATH
import ranks
from recipes import LOSS_SCALE, PRECISIONS

WARMUP = 2  # steps that are not timed
GPU_WARMUP = 8  # PyTorch tries its algorithms out in the first steps
GPU_SECONDS = 0.3  # of steps that are timed together
EPOCH = 40_000  # images


def main():
    parser = argparse.ArgumentParser(
        description="Time minires, beside PyTorch where it is installed.", allow_abbrev=False
    )
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument(
        "--batch-size",
        type=at_least(1),
        nargs="+",
        metavar="N",
        help="default 128, on a GPU 128 512 1024; only a GPU takes several",
    )
    parser.add_argument(
        "--precision", nargs="+", choices=list(PRECISIONS), default=[*reversed(PRECISIONS)], help="on a GPU"
    )
    parser.add_argument("--rounds", type=at_least(1), default=5, metavar="N", help="default 5")
    parser.add_argument(
        "--steps", type=at_least(1), default=3, metavar="N", help="timed steps of each in a round, default 3"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile too")
    parser.add_argument("--layers", action="store_true", help="only the table of minires by layer")
    parser.add_argument("--ranks", type=at_least(2), metavar="N", help="only training, beside that of N processes")
    parser.add_argument("--debug", action="store_true", help="errors with a traceback")
    args = parser.parse_args()
    if args.device == "gpu":
        return benchmark_gpu(args)
    if len(args.batch_size or []) > 1:
        parser.error("--batch-size takes one size on the CPU")
    args.batch_size = (args.batch_size or [128])[0]

    versions = f"Python {platform.python_version()}, NumPy {np.__version__}"
    print(f"{num_threads()} threads each, {processor()}, {versions}, batch {args.batch_size}")
    if args.layers:
        print_layers(args.batch_size, args.rounds * args.steps)
        return
    if args.ranks:
        return ranks.compare(args.ranks, args.batch_size, args.rounds, args.steps)
    contestants = {"minires": Minires} | torch_contestants(Torch, TorchCompiled, args.compile)
    workers = start_workers(contestants, args.batch_size, args.steps)
    for task in ("train", "evaluate"):
        for worker in workers.values():
            worker.ask("warm_up", task)
        seconds = {name: [] for name in workers}
        for _ in range(args.rounds):
            for name, worker in workers.items():
                seconds[name].append(worker.ask("time", task))
        print_table(
            task, seconds, args.batch_size * args.steps, {name: worker.peak for name, worker in workers.items()}
        )
    for worker in workers.values():
        worker.stop()


def torch_contestants(eager, compiled, with_compiled):
    """PyTorch's contestants by name, none where it is not installed."""
    if not importlib.util.find_spec("torch"):
        print("PyTorch is not installed: minires runs alone")
        return {}
    return {"PyTorch eager": eager} | ({"torch.compile": compiled} if with_compiled else {})


def start_workers(contestants, *arguments):
    workers = {name: Worker(contestant, *arguments) for name, contestant in contestants.items()}
    print("versions: " + ", ".join(f"{name} {worker.ask('version')}" for name, worker in workers.items()))
    return workers


def processor():
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(": ")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def print_table(task, seconds, images, peaks):
    print(f"\n{task:<16} {'images/s':>9} {'from':>7} {'to':>7}   minires is faster by   {'peak memory':>11}")
    for name, times in seconds.items():
        speeds = sorted(images / s for s in times)
        ratio = ratios(times, seconds["minires"]) if name != "minires" else ""
        peak = f"{peaks[name]:,.0f} MB" if task == "train" else ""
        print(
            f"{name:<16} {statistics.median(speeds):9.1f} {speeds[0]:7.1f} {speeds[-1]:7.1f}   {ratio:<20}   {peak:>11}"
        )


def ratios(theirs, ours):
    """How many times as long they take, round by round: the median, the least and the most."""
    rounds = sorted(their_time / our_time for their_time, our_time in zip(theirs, ours, strict=True))
    return f"{statistics.median(rounds):.2f} ({rounds[0]:.2f} to {rounds[-1]:.2f})"


class Worker:
    """A contestant in a process of its own, which does what it is asked and otherwise sleeps."""

    def __init__(self, contestant, *arguments):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        arguments = ("--debug" in sys.argv, theirs, contestant, *arguments)
        self.process = context.Process(target=serve, args=arguments, daemon=True)
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # it inherits this: a Ctrl-C ends it from here
        self.process.start()
        signal.signal(signal.SIGINT, before)
        theirs.close()  # once it has ended, nothing more can come
        self.peak = 0  # MB, after the latest training

    def ask(self, *question):
        time.sleep(0.3)  # lets the threads of the one before come to rest
        try:
            with contextlib.suppress(OSError):  # what ended it is still to be read
                self.pipe.send(question)
            answer, peak = self.pipe.recv()
        except (EOFError, OSError) as error:
            self.process.join()
            code = self.process.exitcode
            raise RuntimeError(
                f"the process of a contestant has ended with {code}, perhaps for want of memory"
            ) from error
        if isinstance(answer, Exception):
            raise answer
        if question[-1] == "train":
            self.peak = peak
        return answer

    def stop(self):
        self.pipe.send(None)
        self.process.join()


def serve(debug, pipe, contestant, *arguments):
    """Make the contestant and answer questions, each the name of an attribute, called with what follows it.

    What ends this process is told to the one who asks, in a type that can travel.
    """
    try:
        contestant = contestant(*arguments)
        while question := pipe.recv():
            answer = getattr(contestant, question[0])
            pipe.send((answer(*question[1:]) if callable(answer) else answer, peak_memory()))
    except Exception as error:
        memory = isinstance(error, MemoryError)
        told = MemoryError(str(error)) if memory else RuntimeError(f"{type(error).__name__}: {error}")
        with contextlib.suppress(OSError):  # the one who asks may have ended
            pipe.send((told, 0))
        if debug:
            raise


def peak_memory():
    """The most memory that this process has had, in MB; NaN on Windows, where Python does not tell."""
    try:
        import resource
    except ModuleNotFoundError:
        return float("nan")
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes on a Mac, KB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


class OnCPU:
    """A contestant that trains and evaluates on one batch, again and again."""

    def __init__(self, batch_size, steps=1):
        rng = np.random.default_rng(0)
        self.images = rng.standard_normal((batch_size, 32, 32, 3)).astype(np.float32)
        self.labels, self.steps = rng.integers(0, 10, batch_size), steps

    def warm_up(self, task):
        for _ in range(WARMUP):
            getattr(self, task)()

    def time(self, task):
        """Return the seconds of the steps of one round."""
        return seconds(lambda: [getattr(self, task)() for _ in range(self.steps)])


class Minires(OnCPU):
    version = minires.__version__

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.model = minires.ResNet()
        self.loss_function = minires.SoftmaxCrossEntropy()
        self.optimizer = minires.Adam(self.model.parameters())

    def train(self):
        self.model.train()
        self.optimizer.zero_grad()
        loss = self.loss_function(self.model(self.images), self.labels)
        self.model.backward(self.loss_function.backward(), need_dx=False)
        self.optimizer.step()
        return float(loss)

    def evaluate(self):
        return float(self.model.eval()(self.images).sum())


class Torch(OnCPU):
    def __init__(self, *arguments):
        import torch
        from torch_resnet import TorchResNet

        super().__init__(*arguments)
        torch.set_num_threads(num_threads())
        self.torch, self.version = torch, torch.__version__
        self.images = torch.from_numpy(self.images.transpose(0, 3, 1, 2))  # a view: channels last in memory
        self.labels = torch.from_numpy(self.labels)
        self.model = TorchResNet().to(memory_format=torch.channels_last)
        self.loss_function = torch.nn.CrossEntropyLoss()
        self.optimizer = torch.optim.Adam(self.model.parameters())

    def train(self):
        self.model.train()
        self.optimizer.zero_grad()
        loss = self.loss_function(self.model(self.images), self.labels)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def evaluate(self):
        with self.torch.inference_mode():
            return self.model.eval()(self.images).sum().item()


class TorchCompiled(Torch):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.model = self.torch.compile(self.model)


def benchmark_gpu(args):
    """A table of training steps on a GPU: each precision with each size of batches, the contestants in turn."""
    cupy = gpu_library()
    name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    print(f"{name}, Python {platform.python_version()}, CuPy {cupy.__version__}")
    if args.layers:
        print_kernels(args)
        return
    contestants = {"minires": MiniresOnGPU, "minires, not recorded": MiniresUnrecorded}
    contestants |= torch_contestants(TorchOnGPU, TorchCompiledOnGPU, args.compile)
    workers = start_workers(contestants)
    print(
        f"\n{'':<9} {'batch':>5}  {'':<21} {'ms a step':>9} {'from':>7} {'to':>7} {'s an epoch':>10} {'MB':>6}"
        "  minires is"
    )
    for precision in args.precision:
        for batch_size in args.batch_size or [128, 512, 1024]:
            memory = {name: worker.ask("prepare", precision, batch_size) for name, worker in workers.items()}
            times = {name: [] for name in workers}
            for _ in range(args.rounds):
                for name, worker in workers.items():
                    times[name].append(worker.ask("time") * 1000)
            for name, milliseconds in times.items():
                median = statistics.median(milliseconds)
                faster = f"{ratios(milliseconds, times['minires'])} times as fast"
                print(
                    f"{precision:<9} {batch_size:>5}  {name:<21} {median:9.2f} {min(milliseconds):7.2f} "
                    f"{max(milliseconds):7.2f} {median / 1000 * EPOCH / batch_size:10.2f} {memory[name] / 2**20:6.0f}  "
                    + (faster if name != "minires" else ""),
                    flush=True,
                )
    for worker in workers.values():
        worker.stop()


class MiniresOnGPU:
    """What train_cifar.py does on a GPU: forward and backward recorded, then the optimizer."""

    version, recorded = minires.__version__, True

    def prepare(self, precision, batch_size):
        """Set up and warm up; return the bytes of device memory that this took."""
        cupy = gpu_library()
        self.train = None
        cupy.get_default_memory_pool().free_all_blocks()
        free, _ = cupy.cuda.runtime.memGetInfo()
        gpu.set_precision("float32" if precision == "float32" else "tf32")
        rng = np.random.default_rng(0)
        images = rng.standard_normal((batch_size, 32, 32, 3)).astype(PRECISIONS[precision])
        images, labels = cupy.asarray(images), cupy.asarray(rng.integers(0, 10, batch_size))
        model, loss_function = minires.ResNet().to("gpu"), minires.SoftmaxCrossEntropy()
        optimizer = minires.Adam(model.parameters())
        scale = LOSS_SCALE if precision == "fp16" else 1.0

        def fill_gradients(images, labels):
            optimizer.zero_grad()
            loss = loss_function(model(images), labels)
            model.backward(loss_function.backward(scale), need_dx=False)
            return loss

        if self.recorded and precision != "float32":
            fill_gradients = gpu.replay(fill_gradients)

        def train():
            fill_gradients(images, labels)
            optimizer.step(1 / scale)

        self.train, self.wait = train, cupy.cuda.Device().synchronize
        self.warm_up()
        return free - cupy.cuda.runtime.memGetInfo()[0]

    def warm_up(self):
        self.steps = GPU_WARMUP
        self.time()
        self.steps = max(5, int(GPU_SECONDS / self.time()))

    def time(self):
        """Return the seconds of a step."""
        started = time.perf_counter()
        for _ in range(self.steps):
            self.train()
        self.wait()
        return (time.perf_counter() - started) / self.steps


class MiniresUnrecorded(MiniresOnGPU):
    recorded = False


class TorchOnGPU:
    """As PyTorch's users write it for speed: channels last, cuDNN's algorithms tried out, autocast, fused Adam."""

    def __init__(self):
        import torch

        self.torch, self.version = torch, torch.__version__

    def compiled(self, model):
        return model

    def prepare(self, precision, batch_size):
        from torch_resnet import TorchResNet

        torch = self.torch
        self.train = None
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision != "float32"
        model = self.compiled(TorchResNet().cuda().to(memory_format=torch.channels_last))
        optimizer = torch.optim.Adam(model.parameters(), fused=True)
        loss_function, scaler = torch.nn.CrossEntropyLoss(), torch.amp.GradScaler(enabled=precision == "fp16")
        images = torch.randn(batch_size, 3, 32, 32, device="cuda").to(memory_format=torch.channels_last)
        labels = torch.randint(0, 10, (batch_size,), device="cuda")

        def train():
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", torch.float16, enabled=precision == "fp16"):
                loss = loss_function(model(images), labels)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

        self.train, self.wait = train, torch.cuda.synchronize
        self.warm_up()
        return free - torch.cuda.mem_get_info()[0]

    warm_up, time = MiniresOnGPU.warm_up, MiniresOnGPU.time


class TorchCompiledOnGPU(TorchOnGPU):
    def compiled(self, model):
        self.torch._dynamo.reset()
        return self.torch.compile(model, mode="max-autotune")


def print_kernels(args):
    """The milliseconds of each kernel in a training step, beside the least that its memory or its products need.

    The floor of a launch is the bytes of its arrays, each once, at the rate of a copy, or its multiplications at the
    rate of a large product of cuBLAS, whichever is longer. A launch is timed between two events, which adds about 2
    microseconds; Python asks for all of them while the GPU is held up, so that none waits for Python.
    """
    cupy = gpu_library()
    large = cupy.random.standard_normal((8192, 8192), dtype="float32")
    half = large.astype("float16")
    rates = {"half": 2 * 8192**3 / gpu_seconds(lambda: half @ half), "float": 0.0}
    rates["float"] = rates["half"] / 2  # of TF32, by its design
    bytes_a, bytes_b = (cupy.empty(2**30, "uint8") for _ in range(2))
    copy = 2 * bytes_a.nbytes / gpu_seconds(lambda: cupy.copyto(bytes_b, bytes_a))
    print(
        f"a product of 8192x8192 halves runs at {rates['half'] / 1e12:.0f} TFLOP/s, a copy moves {copy / 1e12:.2f} TB/s"
    )
    for precision in args.precision:
        contestant = MiniresUnrecorded()
        contestant.prepare(precision, (args.batch_size or [128])[0])
        launches, launch = [], gpu.launch

        def timed(name, blocks, threads, *arguments, launch=launch, launches=launches, **options):
            start, end = cupy.cuda.Event(), cupy.cuda.Event()
            start.record()
            launch(name, blocks, threads, *arguments, **options)
            end.record()
            size = sum(a.nbytes for a in arguments if hasattr(a, "nbytes") and getattr(a, "ndim", 0))
            floor = max(size / copy, operations(name, arguments) / rates["half" if "<half" in name else "float"])
            launches.append((name.partition("<")[0], start, end, floor))

        gpu.launch = timed
        for _ in range(20):
            large @ large  # so long the GPU has something to do
        contestant.train()
        contestant.wait()
        gpu.launch = launch
        rows = {}
        for name, start, end, floor in launches:
            count, spent, least = rows.get(name, (0, 0.0, 0.0))
            rows[name] = count + 1, spent + cupy.cuda.get_elapsed_time(start, end), least + 1000 * floor
        print(f"\n{precision:<28} {'launches':>8} {'ms':>7} {'floor':>7}")
        for name, (count, spent, least) in sorted(rows.items(), key=lambda row: -row[1][1]):
            print(f"{name:<28} {count:8} {spent:7.3f} {least:7.3f}")
        total = [sum(column) for column in zip(*rows.values(), strict=True)]
        print(f"{'all of gpu.cu':<28} {total[0]:8} {total[1]:7.3f} {total[2]:7.3f}")


def operations(name, arguments):
    """The multiplications and additions of a convolution, from its kernel's arguments; 0 for others."""
    if not name.startswith("convolve"):
        return 0
    if name.startswith("convolve_weight"):
        dout, partial = arguments[1:3]
        return 2 * dout.size * (partial.size // len(partial) // dout.shape[-1])
    source, weight, target = arguments[:3]
    forward = name.endswith("true>")
    out = target if forward else source
    return 2 * out.size * weight.size // out.shape[-1]


def gpu_seconds(function):
    cupy = gpu_library()
    function()
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    start.record()
    for _ in range(5):
        function()
    end.record()
    end.synchronize()
    return cupy.cuda.get_elapsed_time(start, end) / 5 / 1000


def print_layers(batch_size, steps):
    """The median milliseconds of each layer, and the least that this machine's arithmetic and memory allow.

    The floor of a convolution is its multiplications (a quarter of them for a 3x3 window with stride 1, by Winograd's
    F(4x4, 3x3)) at the rate of a large matrix product; that of a normalisation is reading and writing each of its
    arrays once, those of the ReLU and of the sum that it includes among them, at the rate of a copy.
    """
    contestant = Minires(batch_size)
    shapes = output_shapes(contestant.model, (32, 32, 3))
    leaves = [
        part for part in parts_first(contestant.model) if not isinstance(part, minires.Sequential | minires.BasicBlock)
    ]
    timings = {(layer, way): [] for layer in leaves for way in ("forward", "backward")}

    def timed(layer, way):
        function = getattr(layer, way)

        def call(*args, **kwargs):
            started = time.perf_counter()
            result = function(*args, **kwargs)
            timings[layer, way].append(1000 * (time.perf_counter() - started))
            return result

        return call

    for layer, way in timings:
        setattr(layer, way, timed(layer, way))
    totals = [1000 * contestant.time("train") for _ in range(WARMUP + steps)]

    gflops, gigabytes = product_rate(), copy_rate()
    print(f"a product of 4096x4096 matrices runs at {gflops:.0f} GFLOP/s, a copy moves {gigabytes:.1f} GB/s\n")
    print(f"{'layer':<26} {'output':<14} {'forward':>8} {'floor':>7} {'backward':>9} {'floor':>7}   milliseconds")
    names = {module: name for name, module in contestant.model.named_modules()}
    with_residual = [part.bn2 for part in contestant.model.modules() if isinstance(part, minires.BasicBlock)]
    sums = np.zeros(4)
    for layer in leaves:
        forward, backward = (statistics.median(timings[layer, way][WARMUP:]) for way in ("forward", "backward"))
        floors = floor(layer, shapes, batch_size, gflops, gigabytes, layer is not leaves[0], layer in with_residual)
        row = (forward, floors[0], backward, floors[1])
        sums += row
        shape = "x".join(map(str, shapes[layer]))
        print(f"{names[layer]:<26} {shape:<14} {row[0]:8.1f} {row[1]:7.1f} {row[2]:9.1f} {row[3]:7.1f}")
    print(f"{'all layers':<41} {sums[0]:8.1f} {sums[1]:7.1f} {sums[2]:9.1f} {sums[3]:7.1f}")
    total = statistics.median(totals[WARMUP:])
    print(f"{'the rest (loss, sums of shortcuts, optimizer)':<58} {total - sums[0] - sums[2]:9.1f}")
    print(f"{'a training step':<58} {total:9.1f} {sums[1] + sums[3]:7.1f}")


def floor(layer, shapes, batch_size, gflops, gigabytes, need_dx, has_residual):
    """The least milliseconds of a layer's forward and backward."""
    size = batch_size * int(np.prod(shapes[layer]))  # of the output
    if isinstance(layer, minires.Conv2d):
        window = layer.kernel_size**2 * layer.in_channels
        products = 2 * size * window / (4 if (layer.kernel_size, layer.stride) == (3, 1) and window > 27 else 1)
        return products / gflops / 1e6, (1 + need_dx) * products / gflops / 1e6
    if isinstance(layer, minires.BatchNorm2d):
        once = 4 * size / gigabytes / 1e6
        return (2 + has_residual) * once, (3 + layer.relu + has_residual) * once  # x, out; dout, x, dx
    return 0.0, 0.0


def product_rate():
    a = np.ones((4096, 4096), np.float32)
    a @ a
    return 2 * 4096**3 / 1e9 / min(seconds(lambda: a @ a) for _ in range(3))


def copy_rate():
    """Bytes read and bytes written, both counted, on all threads."""
    a = np.ones((64, 2**20), np.float32)
    b = np.empty_like(a)
    return 2 * a.nbytes / 1e9 / min(seconds(lambda: run(lambda i: np.copyto(b[i], a[i]), range(64))) for _ in range(5))


def seconds(function):
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


if __name__ == "__main__":
    run_script(main)
