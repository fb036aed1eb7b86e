"""Text, numbers and errors as messages show them."""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from selftrans import messages
from selftrans.messages import (
    are,
    as_word,
    duration,
    escaped,
    filled,
    first_line,
    gigabytes,
    is_own_code,
    listed,
    on_one_line,
    one_line,
    page,
    plural,
    printable,
    shape_text,
    three_digits,
)


def test_named_pages_of_the_documentation_exist() -> None:
    assert Path(page("data.md")).read_text(encoding="utf-8").startswith("# ")
    for file in messages.PACKAGE.rglob("*.py"):
        for name in re.findall(r"docs/([\w/-]+\.md)|page\(['\"](.+?)['\"]\)", file.read_text(encoding="utf-8")):
            assert (messages.DOCS / "".join(name)).is_file(), f"{file} names {name}"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain name.png", "plain name.png"),
        ("Ameise Ölbaum 猫", "Ameise Ölbaum 猫"),
        ("red\x1b[31m", "red\\x1b[31m"),
        ("two\nlines", "two\\nlines"),
        ("right\u202eto left", "right\\u202eto left"),
        ("not utf-8 \udcff", "not utf-8 \\udcff"),
        (17, "17"),
    ],
)
def test_control_characters_are_escaped(text, shown):
    assert printable(text) == shown and printable(text).isprintable()


@pytest.mark.parametrize("made", [escaped, printable])
def test_only_what_a_terminal_does_not_print_is_escaped(made):
    """Not the rest of such a name, nor what joins letters in Persian and parts of emoji."""
    assert made("Ölbaum\n\x1b[31m \\ 猫 \udcff") == "Ölbaum\\n\\x1b[31m \\ 猫 \\udcff"
    for name in ("خانه\u200cها", "\U0001f469\u200d\U0001f680", "cafe\u0301", "हिंदी"):
        assert made(name) == name


def test_text_is_wrapped_to_a_terminal_only(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    text = "a sentence that is longer than the terminal is wide"
    assert filled(text) == text
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert filled(text) == "a sentence that is longer than the\nterminal is wide"


def test_a_path_is_one_word_of_a_command_line():
    assert as_word(Path("runs/a")) == "runs/a" and as_word("my runs/a$b") == "'my runs/a$b'"
    assert as_word("a$b\x1bc\u202f") == "$'a$b\\x1bc\\xe2\\x80\\xaf'"


@pytest.mark.parametrize("name", ["a\x1bb", "1\u202f000\xa0km", "it's\n\\x", "no utf-8 \udcff0", "tab\t$HOME`id`"])
@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_a_path_that_is_pasted_is_that_path(name):
    word = as_word(name)
    assert word.isprintable()
    assert subprocess.run(["bash", "-c", f"printf %s {word}"], stdout=-1, check=True).stdout == os.fsencode(name)


def test_escaped_text_is_truncated():
    assert printable("x" * 500) == "x" * 157 + "..." and printable("x" * 500, None) == "x" * 500
    assert printable("\x1b" * 500, 10) == "\\x1b\\x1..." and printable("x" * 10, 10) == "x" * 10


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("No such file.\nIf this is a private repository, log in."), "No such file"),
        (RuntimeError("Errors in loading SiT:\n\tsize mismatch for x\n\tand y"), "Errors in loading SiT: size mismatch for x"),
        (MemoryError(), "MemoryError"),
        (ValueError("   \n"), "ValueError"),
        (ValueError("bad \x1b[2J name"), "bad \\x1b[2J name"),
        (ValueError("no file 12\u202f000\xa0a  b.png"), "no file 12\\u202f000\\xa0a  b.png"),
        (ValueError("x" * 999), "x" * 157 + "..."),
        (ValueError("a word " * 30), ("a word " * 30)[:155] + "..."),
    ],
)  # fmt: skip
def test_first_line_of_an_error(error, line):
    assert first_line(error) == line


def test_a_message_on_one_line_keeps_the_spaces_of_names():
    assert on_one_line(" wrong\n  a\xa0\u202f  b\t\tc\r\n") == "wrong a\xa0\u202f  b c"


def test_bytes_have_three_digits_at_most_whatever_their_number():
    sizes = (0, 74_400, 999_499, 999_999, 5e6, 99.94e6, 134e6, 1.234e9, 21e9, 999.4e9, 999.9e9, 9.8e12)
    assert [gigabytes(size) for size in sizes] == [
        *("0 kB", "74.4 kB", "999 kB", "1 MB", "5 MB", "99.9 MB", "0.134 GB"),
        *("1.23 GB", "21 GB", "999 GB", "1 TB", "9.8 TB"),
    ]


def test_numbers_have_no_exponent():
    values = (0.01234, 45.64, 999.4, 999.6, 1019.7, 2_534_000.2)
    assert [three_digits(value) for value in values] == ["0.0123", "45.6", "999", "1,000", "1,020", "2,534,000"]


def test_durations():
    assert [duration(s) for s in (0, 40, 7500, 97_500)] == ["0 s", "40 s", "2 h 5 min", "1 d 3 h"]


def test_numbers_with_their_nouns():
    found = [plural(0, "picture"), plural(1, "class"), plural(2, "class"), plural(12345, "box"), plural(2, "batch")]
    assert found == ["0 pictures", "1 class", "2 classes", "12,345 boxes", "2 batches"]
    assert [are(0), are(1), are(2)] == ["are", "is", "are"]
    assert [shape_text(shape) for shape in ((3, 32, 16), [8])] == ["3x32x16", "8"]
    assert [listed([]), listed(["a", "\x1b"]), listed("abc", 2)] == ["", "a, \\x1b", "a, b and 1 more"]


def test_captions_and_names_are_one_clean_line() -> None:
    assert one_line(" a\tb\x00c \x1b[2J\n d\u2028e ") == "a b c [2J d e"
    assert one_line("a \ud800 b") == "a ? b" and one_line("\x00 \n") == ""
    joined = (
        "\U0001f468\u200d\U0001f469 \u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"  # an emoji and a Persian word
    )
    assert one_line(f"\u202e{joined}\u00a0x") == f"{joined} x"


def test_library_in_a_folder_named_selftrans_is_not_own_code():
    """As after `git clone` with the virtual environment inside: whose warnings are shown must not depend on that name."""
    assert is_own_code(messages.__file__) and is_own_code(str(messages.PACKAGE / "data" / "prepare.py"))
    assert not is_own_code("/home/a/selftrans/.venv/lib/python3.12/site-packages/torch/nn/functional.py")
    assert not is_own_code("sys")


PRINTING = """
import sys
from selftrans.messages import redirect_closed_output
sys.stdin.readline()
redirect_closed_output()
for stream in (sys.stdout, sys.stderr):
    print("a line", file=stream, flush=True)
"""


@pytest.mark.parametrize("connect", [os.pipe, pty.openpty])
@pytest.mark.parametrize("lost", [True, False])
def test_output_to_a_closed_terminal_or_pipe_is_discarded(connect, lost):
    """Otherwise a run of days would end with its terminal, or with the `tee` that reads its output."""
    reader, writer = connect()
    process = subprocess.Popen([sys.executable, "-c", PRINTING], stdin=subprocess.PIPE, stdout=writer, stderr=writer)
    if connect is os.pipe or lost:
        os.close(writer)  # a pseudo-terminal that no process has open would lose what was written to it
    if lost:
        os.close(reader)
    process.communicate(b"\n")
    assert process.returncode == 0
    if not lost:
        assert os.read(reader, 100).split() == [b"a", b"line"] * 2
