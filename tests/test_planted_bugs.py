"""The list of planted bugs fits the code: what it would change is there, and so are the tests that have to see it.

That the bugs are caught is shown by `python tests/planted_bugs.py`, in a few minutes.
"""

import pytest
from planted_bugs import BUGS, ROOT, planted


@pytest.mark.parametrize("bug", BUGS, ids=[bug.name for bug in BUGS])
def test_a_planted_bug_fits_the_code(bug):
    assert planted(ROOT, bug) != (ROOT / bug.file).read_text("utf-8")
    changed = [old != new for old, new in zip(bug.old.splitlines(), bug.new.splitlines(), strict=True)]
    assert sum(changed) == 1
    for test in bug.tests:
        file, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / file).read_text(), f"there is no {test}"


def test_names_are_told_apart():
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 20
