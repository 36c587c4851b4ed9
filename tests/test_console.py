"""What is said beside a program's output is said on any console or on none; commands can be pasted."""

import shlex
import sys

import pytest

from minires.console import command_line, note, progress_bar, warn


def test_a_command_can_be_pasted_into_the_systems_own_shell(monkeypatch):
    words = ["python", "train.py", "--resume", "my runs/it's"]
    commands = {}
    for name in ("posix", "nt"):
        with monkeypatch.context() as patch:
            patch.setattr("os.name", name)
            commands[name] = command_line(words)
    assert shlex.split(commands["posix"]) == words
    assert commands["nt"] == 'python train.py --resume "my runs/it\'s"'


def test_a_note_on_no_console_and_on_a_full_disk(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    note("a line")
    monkeypatch.setattr(sys, "stderr", FullDisk())
    note("a line")


class FullDisk:
    def write(self, text):
        raise OSError(28, "No space left on device")


def test_a_warning_ends_nothing_where_warnings_are_errors(capsys):
    warn("a line")  # pytest makes errors of them
    assert capsys.readouterr().err == "warning: a line\n"
    with pytest.warns(UserWarning, match="a line"):
        warn("a line")


def test_a_bar_without_a_terminal_shows_nothing(capsys):
    with progress_bar(total=3, initial=1, desc="epoch") as bar:
        bar.set_postfix_str("loss 1", refresh=False)
        bar.update()
        assert bar.disable
    assert capsys.readouterr().err == ""
