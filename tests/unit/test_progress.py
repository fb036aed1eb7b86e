"""Progress bars on a terminal and in a file."""

import pytest

from selftrans.progress import progress_bar


def test_progress_bar_prints_lines_without_a_terminal(capsys):
    bar = progress_bar(total=2, desc="stage1", unit="step")
    bar.update(2)
    bar.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("stage1:   0% 0/2") and lines[-1].startswith("stage1: 100% 2/2")


@pytest.mark.parametrize("leave", [False, True])
def test_a_file_gets_no_control_characters(leave, capsys):
    assert list(progress_bar([5, 6], desc="sizes", unit=" pictures", leave=leave)) == [5, 6]
    written = capsys.readouterr().err
    assert written.endswith("\n") and written.replace("\n", "").isprintable()


def test_a_bar_for_terminals_only_writes_nothing_into_a_file(capsys):
    assert list(progress_bar([5, 6], disable=None)) == [5, 6]
    assert not capsys.readouterr().err
