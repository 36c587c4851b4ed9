"""Importing minires is quick, quiet and needs NumPy alone; the README and the project agree with each other."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

import minires

ROOT = pathlib.Path(__file__).parent.parent


def test_importing_does_nothing_visible_and_loads_numpy_alone(tmp_path):
    code = (
        "import sys, numpy; before = set(sys.modules); import minires; "
        "print(sorted({name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout == "['minires']\n"
    assert run.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_every_public_name_exists_and_is_documented():
    for name in minires.__all__:
        assert getattr(minires, name).__doc__, name


def test_every_file_opens_with_what_it_is_for():
    for path in [path for folder in ("minires", "examples", "tests") for path in ROOT.glob(f"{folder}/**/*.py")]:
        assert path.read_text("utf-8").startswith('"""'), path


GROUND = ["backend", "rng", "console"]
MATHEMATICS = [
    "kernels.reference",
    "module",
    "layers",
    "loss",
    "resnet",
    "gradcheck",
    "optim",
    "schedules",
    "summary",
    "augment",
    "trivial_augment",
    "batches",
    "evaluation",
    "folding",
]
MADE_FAST = ["kernels.threads", "kernels.memory", "kernels.winograd", "kernels.cpu", "kernels.gpu", "kernels"]
MADE_SAFE = [
    "cifar10.download",
    "cifar10.files",
    "cifar10",
    "cifar10.__main__",
    "plots",
    "training.storage",
    "training.weights",
    "training.checkpoint",
    "training.finite",
    "training.folder",
    "training.gradients",
    "training.nccl",
    "training.distributed",
    "training.launch",
    "training.signals",
    "training.output",
    "training.run",
    "training.arguments",
    "training.script",
    "training",
]


def file_of(module):
    path = ROOT / "minires" / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def test_each_file_belongs_to_one_of_three_paths():
    files = [file_of(module) for module in GROUND + MATHEMATICS + MADE_FAST + MADE_SAFE]
    assert sorted(files) == sorted({*ROOT.glob("minires/**/*.py")} - {ROOT / "minires" / "__init__.py"})


@pytest.mark.parametrize(
    ("path", "others"),
    [
        (MATHEMATICS, [*GROUND, "kernels"]),
        (MADE_FAST, [*GROUND, "kernels.reference"]),
        (MADE_SAFE, [*GROUND, *MATHEMATICS, "kernels"]),
    ],
)
def test_a_file_imports_only_files_above_it(path, others):
    """Above it in its own path, in the ground, or in a path before: there are no circles."""
    above = {f"minires.{module}" for module in others}
    for module in path:
        for imported in imports_of(file_of(module)):
            assert imported in above, f"{module} imports {imported}, which comes later"
        above.add(f"minires.{module}")


def imports_of(path):
    """The modules of minires that a file imports, wherever it does."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("minires."))
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "minires":
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            found = {name for name in submodules if file_of(name.removeprefix("minires.")).exists()}
            yield from found or {node.module} - {"minires"}


def test_the_readme_leads_through_the_first_two_paths_in_their_order():
    text = (ROOT / "README.md").read_text("utf-8")
    parts = re.split(r"\*\*(?:The mathematics|Made fast|Made safe)\*\*", text)[1:3]
    for path, part in zip((MATHEMATICS, GROUND + MADE_FAST[:-1]), parts, strict=True):
        named = re.findall(r"\]\((minires/[\w/]+\.py)\)", part)
        expected = [str(file_of(module).relative_to(ROOT)) for module in path]
        assert [name for name in named if not name.endswith("__init__.py")] == expected


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 220


@pytest.mark.slow
def test_the_code_of_the_readme_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert "range(1, 6)" in code
    exec(code.replace("range(1, 6)", "range(1, 2)"), {})  # one epoch is enough to see that it runs
    out = capsys.readouterr().out
    assert "of 500 test images are right" in out
    assert "Total params: " in out
