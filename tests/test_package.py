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


def test_the_data_set_is_imported_when_first_asked_for():
    code = "import sys, minires; before = 'minires.cifar10' in sys.modules; print(before, len(minires.cifar10.CLASSES))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False 10\n"
    with pytest.raises(AttributeError, match="module 'minires' has no attribute 'cifar100'"):
        _ = minires.cifar100


def test_every_public_name_exists_and_is_documented():
    for name in minires.__all__:
        assert getattr(minires, name).__doc__, name


def test_every_file_opens_with_what_it_is_for():
    for path in [*ROOT.glob("minires/**/*.py"), *ROOT.glob("examples/*.py"), *ROOT.glob("tests/*.py")]:
        assert path.read_text().startswith('"""'), path


def test_a_file_imports_only_files_above_it():
    """The reading order of minires/__init__.py and the README is also the order of imports."""
    listed = re.findall(r"^\| \d+ \| \[`(minires/[\w/.]+)`\]", (ROOT / "README.md").read_text(), re.MULTILINE)
    above = set()
    for path in listed:
        if path.endswith(".cu"):
            continue
        nodes = [node for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.ImportFrom)]
        for module in {node.module for node in nodes if node.module.startswith("minires")} - {"minires.kernels"}:
            assert module in above, f"{path} imports {module}, which comes later"
        above.add(path.removesuffix(".py").replace("/", "."))


def test_the_line_counts_of_the_readme_are_true():
    rows = re.findall(r"^\| \d+ \| \[`([\w/.]+)`\].*\| (\d+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    listed = {path: int(lines) for path, lines in rows}
    actual = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in [*ROOT.glob("minires/**/*.py"), *ROOT.glob("minires/**/*.cu")]
        if path.name != "__init__.py" or path.parent.name == "kernels"
    }
    assert listed == actual


def test_the_code_of_the_readme_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(code, {})
    assert "Total params: 4,977,226" in capsys.readouterr().out
