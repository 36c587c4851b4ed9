"""Kill a training run at a random moment, let it go on, and compare it with one that nobody killed.

    python tests/kill_and_resume.py                          100 kills by each of SIGKILL, SIGTERM and SIGINT
    python tests/kill_and_resume.py --signals KILL --kills 10

Each trial is a run of 15 steps on the sample, as people start it, but without pictures. Checkpoints are written after
each step, or now and then, or only when a run ends. The moment is drawn evenly from the processor time that such a run
takes from its first line on (the time on the clock depends on what else the machine does). A third of the trials are
hit a second time, after they have been resumed. At the end the weights, the optimizer's state, the best weights, the
position, the log and the result have to be the same, bit by bit, but for the seconds. Not part of the test suite: it
takes a quarter of an hour on two cores. Linux only, for it reads /proc.
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


def main():
    parser = argparse.ArgumentParser(description="Kill training runs, resume them, compare them.")
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="of each signal, default 100")
    parser.add_argument("--signals", nargs="+", default=["KILL", "TERM", "INT"], choices=["KILL", "TERM", "INT"])
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="trials at a time, default 2")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the shell has it ignored

    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        (folder / "hidden").mkdir()
        (folder / "hidden" / "matplotlib.py").write_text('raise ImportError("hidden", name="matplotlib")')
        expected, times = None, {}
        for every in set(CHECKPOINT_EVERY):
            whole = folder / f"never killed, {every}"
            before = os.times()
            process = start(folder, "--out", str(whole), "--checkpoint-every", every)
            process.stdout.readline()  # printed when the run folder is there
            first = processor_seconds(process.pid)
            code, _, err = finish(process)
            assert code == 0, err
            after = os.times()
            last = after.children_user + after.children_system - before.children_user - before.children_system
            times[every] = first, last
            expected = expected or content(whole)
            assert content(whole) == expected, "two runs that nobody has killed differ"
            print(f"checkpoints every {every} minutes: {first:.1f} to {last:.1f} s of processor time", flush=True)
        print(f"{len(expected)} arrays and texts are compared", flush=True)
        wrong = 0
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            for name in args.signals:
                number = getattr(signal, f"SIG{name}")
                trials = [(folder / f"{name}-{i}", number, i, times) for i in range(args.kills)]
                results = []
                for result in pool.map(lambda trial: one_trial(*trial, expected), trials):
                    results.append(result)
                    print(f"\r{name}: {len(results)} of {args.kills}", end="", file=sys.stderr, flush=True)
                print(file=sys.stderr)
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
    process = start(folder.parent, "--out", str(folder), "--checkpoint-every", every)
    for hits in range(1 + (rng.random() < 1 / 3), -1, -1):
        if hits:
            moment = rng.uniform(*times[every])
            while process.poll() is None and processor_seconds(process.pid) < moment:
                time.sleep(rng.uniform(0, 0.02))
            process.send_signal(number)
        code, out, err = finish(process)
        steps += [int(line.split()[3]) for line in out.splitlines() if line.startswith("resuming after step")]
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


def start(folder, *args):
    flags = [] if "--resume" in args else [*FLAGS, *SMALLER]
    environment = {**os.environ, "MINIRES_NUM_THREADS": "1", "PYTHONPATH": f"{folder / 'hidden'}:{ROOT}"}
    command = [sys.executable, SCRIPT, *flags, *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def resume(folder, every):
    if not (folder / "config.json").exists():  # it had not begun
        return start(folder.parent, "--out", str(folder), "--checkpoint-every", every)
    return start(folder.parent, "--resume", str(folder))


def processor_seconds(pid):
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has ended
        return float("inf")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # in user and in system mode


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
