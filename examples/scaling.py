"""How far does it scale? A model on paper of training in 1 to 1,024 processes; nothing is measured here.

    python examples/scaling.py

A message of s bytes takes alpha + s / bandwidth. A sum over n processes takes, by recursive halving and doubling,

    2 log2(n) alpha + 2 (n - 1) / n s / bandwidth        the gradients: bandwidth counts, whatever n is
    log2(n) (alpha + s / bandwidth)                      BatchNorm's small sums, which are not cut: the latency counts

A step takes its computation, the 28 sums of BatchNorm and that of the loss, for which all wait, and as much of the sum
of gradients as the backward of other layers does not hide. Within a machine, messages take the faster way.
Left out: processes that are slower than others, links that several of them share, the reading of images, and the step
of the optimizer, which each process takes for itself.

Weak scaling keeps the images of a process at 128: the batch grows. Strong scaling keeps the batch, and with it what is
learned from an epoch. Efficiency is the speed of n processes over n times that of one.

Source      Thakur, Rabenseifner and Gropp 2005, "Optimization of collective communication operations in MPICH", for the
            times of sums; Shallue et al. 2019, "Measuring the effects of data parallelism on neural network training",
            for what ends it: beyond some batch, more images in a step save no steps
"""

import functools
import math
from typing import NamedTuple

import minires
from minires.training.script import run_script

PROCESSES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
IMAGES = 50_000  # in an epoch: a batch cannot be larger
HIDING = 0.6  # of a step: backward, from when the first gradients are on their way


class Machine(NamedTuple):
    """Seconds, and bytes a second; `inside` is (processes, latency, bandwidth) of what lies within one machine."""

    name: str
    fixed: float  # of a step, whatever the batch
    image: float
    latency: float
    bandwidth: float
    inside: tuple = (1, 0.0, math.inf)
    local: bool = False  # --local-batch-norm, without BatchNorm's sums


# A core of an Intel Xeon trains at 73 images/s. An H200 takes 2.06 ms for 128 images and 11.42 for 1,024, in fp16; the
# latencies and bandwidths are assumed: TCP on 10 Gb/s, RDMA on 100 Gb/s, NVLink in machines of eight, InfiniBand of
# 400 Gb/s for each GPU; NCCL's latency is that of a launch.
MACHINES = (
    Machine("CPU, a core each, 10 Gb/s", 0.0, 1 / 73, 30e-6, 10e9 / 8),
    Machine("CPU, a core each, 100 Gb/s", 0.0, 1 / 73, 2e-6, 100e9 / 8),
    Machine("H200, NVLink and InfiniBand", 0.72e-3, 10.4e-6, 15e-6, 400e9 / 8, (8, 8e-6, 450e9)),
    Machine("the same, BatchNorm local", 0.72e-3, 10.4e-6, 15e-6, 400e9 / 8, (8, 8e-6, 450e9), local=True),
)


@functools.cache
def network():
    """Bytes of the gradients, of each of BatchNorm's sums in a step, and of that of the loss."""
    model = minires.ResNet()
    norms = [part.num_features for part in model.modules() if isinstance(part, minires.BatchNorm2d)]
    return 4 * model.num_parameters(), [2 * 8 * channels for channels in norms * 2], 8


def hops(machine, n):
    """How many of the log2(n) exchanges go within a machine, and how many between machines."""
    inside = min(n, machine.inside[0])
    return math.log2(inside), math.log2(n / inside)


def step(machine, n, images):
    """Seconds of a step in which each process has so many images."""
    gradients, norms, loss = network()
    small = [loss] if machine.local else [*norms, loss]
    inside, between = hops(machine, n)
    _, near, wide = machine.inside
    compute = machine.fixed + machine.image * images
    waits = sum(
        inside * (near + size / wide) + between * (machine.latency + size / machine.bandwidth) for size in small
    )
    bandwidth = machine.bandwidth if between else wide
    total = 2 * (inside * near + between * machine.latency) + 2 * (n - 1) / n * gradients / bandwidth
    return compute + waits + max(0.0, total - HIDING * compute)


def efficiency(machine, n, images, alone):
    """Images a second of n processes with so many images each, over n times those of one that has `alone`."""
    return images / step(machine, n, images) / (alone / step(machine, 1, alone))


def main():
    print("a model, nothing is measured: efficiency of n processes\n")
    print("weak scaling, 128 images each" + " " * 6 + "".join(f"{n:>7}" for n in PROCESSES))
    print("batch" + " " * 30 + "".join(f"{128 * n:>7}" for n in PROCESSES))
    print("steps in an epoch" + " " * 18 + "".join(f"{math.ceil(IMAGES / (128 * n)):>7}" for n in PROCESSES))
    for machine in MACHINES:
        row = "".join(f"{efficiency(machine, n, 128, 128):>7.0%}" for n in PROCESSES)
        print(f"{machine.name:<35}{row}")
    for batch in (128, 1024, 8192):
        print(f"\nstrong scaling, batches of {batch:<8}" + "".join(f"{n:>7}" for n in PROCESSES))
        for machine in MACHINES:
            row = "".join(
                f"{efficiency(machine, n, batch / n, batch):>7.0%}" if n <= batch else f"{'-':>7}" for n in PROCESSES
            )
            print(f"{machine.name:<35}{row}")
    end = IMAGES // 128
    print(f"\nWith 128 images each, a batch is the whole training set at {end} processes: there weak scaling ends.")
    print("A - is a process without an image: there strong scaling ends.")


if __name__ == "__main__":
    run_script(main)
