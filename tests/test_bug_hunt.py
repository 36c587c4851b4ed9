"""The bug hunt: each bug fits the code, makes its check fail, and is found by what is said to find it."""

import concurrent.futures
import os
import pathlib
import subprocess
import sys
from typing import NamedTuple

import pytest
from lessons import bugs

BUGS_PY = pathlib.Path(bugs.__file__)


def run_checks(project, *names):
    """Return (exit code, {check: what it said}) of checks that are run on a project."""
    environment = os.environ | {"PYTHONPATH": str(project), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, bugs.CHECKS, *names]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode in (0, 1), done.stderr
    assert not done.stderr, done.stderr
    return done.returncode, dict(line.split(": ", 1) for line in done.stdout.splitlines())


def command(*args):
    done = subprocess.run([sys.executable, BUGS_PY, *map(str, args)], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr
