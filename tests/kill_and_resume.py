"""Kill a training run at a random moment, let it go on, and compare it with one that nobody killed.

    python tests/kill_and_resume.py                          100 kills by each of SIGKILL, SIGTERM and SIGINT
    python tests/kill_and_resume.py --signals KILL --kills 10

Each trial is a run of 15 steps on the sample, as people start it. Checkpoints are written after each step, or now and
then, or only when a run ends, and the moment is drawn evenly from the time that such a run takes, but for the start of
Python. A third of the trials are hit a second time, after they have been resumed. At the end the weights, the
optimizer's state, the best weights, the position, the log and the result have to be the same, bit by bit, but for the
seconds. Not part of the test suite: it takes a quarter of an hour on two cores.
"""

import argparse
import collections
import concurrent.futures
import csv
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import safetensors.numpy

ROOT = pathlib.Path(__file__).parent.parent
SCRIPT = str(ROOT / "examples" / "train_cifar.py")
FLAGS = ["--data", "sample", "--epochs", "3", "--batch-size", "4", "--limit-batches", "5", "--device", "cpu"]
SMALLER = ["--blocks", "1", "1", "1", "1", "--schedule", "one-cycle"]
CHECKPOINT_EVERY = ["0", "0", "0.005", "10"]  # minutes
ENVIRONMENT = {**os.environ, "MINIRES_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def main():
    parser = argparse.ArgumentParser(description="Kill training runs, resume them, compare them.")
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="of each signal, default 100")
    parser.add_argument("--signals", nargs="+", default=["KILL", "TERM", "INT"], choices=["KILL", "TERM", "INT"])
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="trials at a time, default 2")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the shell has it ignored

    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        expected, times = None, {}
        for every in set(CHECKPOINT_EVERY):
            whole = folder / f"never killed, {every}"
            started = time.monotonic()
            process = start("--out", str(whole), "--checkpoint-every", every)
            process.stdout.readline()  # printed when the run folder is there
            first = time.monotonic() - started
            code, _, err = finish(process)
            assert code == 0, err
            times[every] = first, time.monotonic() - started
            expected = expected or content(whole)
            assert content(whole) == expected, "two runs that nobody has killed differ"
            print(f"checkpoints every {every} minutes: begins after {first:.1f} s, ends after {times[every][1]:.1f} s")
        print(f"{len(expected)} arrays and texts are compared", flush=True)
        wrong = 0
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            for name in args.signals:
                number = getattr(signal, f"SIG{name}")
                trials = [(folder / f"{name}-{i}", number, i, times) for i in range(args.kills)]
                results = list(pool.map(lambda trial: one_trial(*trial, expected), trials))
                different = [problem for problem, _, _ in results if problem]
                codes = collections.Counter(code for _, codes, _ in results for code in codes)
                steps = collections.Counter(step for _, _, steps in results for step in steps)
                wrong += len(different)
                print(f"{name}: {args.kills - len(different)} of {args.kills} runs end with the same bits")
                print("    how the runs that were hit ended: " + ", ".join(f"{codes[c]} x {c}" for c in sorted(codes)))
                print(
                    "    they went on after step: " + ", ".join(f"{s} ({steps[s]} x)" for s in sorted(steps)),
                    flush=True,
                )
                for problem in different:
                    print(f"    {problem}", flush=True)
    return 1 if wrong else 0


def one_trial(folder, number, seed, times, expected):
    """Return what is wrong, None if nothing; how the process ended each time it was hit; the steps it went on from."""
    rng = random.Random(f"{number} {seed}")
    codes, steps = [], []
    every = rng.choice(CHECKPOINT_EVERY)
    process = start("--out", str(folder), "--checkpoint-every", every)
    for hits in range(1 + (rng.random() < 1 / 3), -1, -1):
        if hits:
            time.sleep(rng.uniform(*times[every]))
            process.send_signal(number)
        code, out, err = finish(process)
        steps += [int(line.split()[4]) for line in out.splitlines() if line.startswith("going on after step")]
        if hits:
            codes.append(code)
            problem = None if code in (0, -number, 128 + number) else f"ended with {code}: {err}"
        else:
            problem = None if code == 0 else f"ended with {code} when nobody had hit it: {err}"
        if problem:
            return f"{folder.name}, checkpoints every {every} minutes: {problem}", codes, steps
        if hits:
            process = resume(folder, every)
    actual = content(folder)
    different = [name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name)]
    left = [path.name for path in folder.glob("*.minires-part")]
    shutil.rmtree(folder)
    if different or left:
        return (
            f"{folder.name}, checkpoints every {every} minutes: {sorted(different)[:3]} differ, {left} left",
            codes,
            steps,
        )
    return None, codes, steps


def start(*args):
    command = [sys.executable, SCRIPT, *FLAGS, *SMALLER, *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


def resume(folder, every):
    if not (folder / "config.json").exists():  # it had not begun
        return start("--out", str(folder), "--checkpoint-every", every)
    command = [sys.executable, SCRIPT, "--resume", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


def finish(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def content(folder):
    """Everything that a run has written, by name, but for the seconds and the settings."""
    found = {}
    for name in ("checkpoint.safetensors", "best.safetensors"):
        data = (folder / name).read_bytes()
        for key, array in safetensors.numpy.load(data).items():
            found[f"{name}: {key}"] = (str(array.dtype), array.shape, array.tobytes())
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        found[f"{name}: metadata"] = without_seconds(json.loads(header["__metadata__"]["minires"]))
    with open(folder / "log.csv") as file:
        found["log.csv"] = without_seconds(list(csv.DictReader(file)))
    found["result.json"] = without_seconds(json.loads((folder / "result.json").read_text()))
    return found


def without_seconds(value):
    if isinstance(value, list):
        return [without_seconds(item) for item in value]
    if isinstance(value, dict):
        left_out = ("seconds", "epoch_seconds", "config")
        return {key: without_seconds(item) for key, item in value.items() if key not in left_out}
    return value


if __name__ == "__main__":
    sys.exit(main())
