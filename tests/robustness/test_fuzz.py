"""Every parser of untrusted files against mutated inputs, coverage-guided inputs, and inputs that once broke it.

`fuzz/parsers.py` defines what a parser may do: return, or raise ValueError in one line. It may raise nothing else, write
nothing outside its folder, start no process, open no connection, and look up no name for a pickle.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.robustness.fuzz import parsers

FUZZ = Path(__file__).parent / "fuzz"

CRASHES = sorted((FUZZ / "crashes").glob("*-*"))
LEAST = 100_000  #: inputs of all parsers together, in the slow suite


@st.composite
def mutated(draw: st.DrawFn, examples: list[bytes]) -> bytes:
    """A valid example with some bytes changed, removed, doubled, or inserted."""
    data = bytearray(draw(st.sampled_from(examples)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        until = min(len(data), at + draw(st.integers(0, 16)))
        data[at:until] = draw(
            st.one_of(
                st.binary(max_size=16),
                st.sampled_from(
                    [b"null", b"-1", b"1e999", b"NaN", b"[]", b"{}", b"\x00" * 8, b"\xff" * 8, b'"../../x"', b"9" * 25]
                ),
                st.just(bytes(data[at:until]) * 2),
            )
        )
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) and draw(st.booleans()) else data)


@pytest.mark.parametrize("name", parsers.PARSERS)
def test_mutated_file_is_read_or_refused_in_one_line(name):
    with parsers.folder_for(name) as folder:

        @settings(
            max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
        )
        @given(mutated(parsers.PARSERS[name].examples()))
        def one(data: bytes) -> None:
            parsers.attempt(name, folder, data)

        one()


@pytest.mark.parametrize("name", parsers.PARSERS)
def test_valid_examples_are_read_and_garbage_is_refused(name):
    with parsers.folder_for(name) as folder:
        assert all(parsers.attempt(name, folder, data) for data in parsers.PARSERS[name].examples())
        if name not in ("log", "shard_record"):  # invalid lines and records are written again
            assert not parsers.attempt(name, folder, b"\x89nothing of the kind")


@pytest.mark.parametrize("path", CRASHES, ids=[path.name for path in CRASHES])
def test_inputs_that_once_broke_a_parser_are_handled(path):
    name = path.name.rpartition("-")[0]
    with parsers.folder_for(name) as folder:
        parsers.attempt(name, folder, path.read_bytes())


def test_forbidden_actions_of_a_parser_are_detected(tmp_path, monkeypatch):
    def writing(path: Path) -> object:
        return (path.parent.parent / "elsewhere").write_text("x")

    def two_lines(path: Path) -> object:
        raise ValueError("one\ntwo")

    def starting(path: Path) -> object:
        return subprocess.Popen(["true"])

    def hiding(path: Path) -> object:
        with contextlib.suppress(Exception):
            writing(path)
        raise ValueError("one line")

    def crashing(path: Path) -> object:
        raise KeyError("x")

    for broken, expected in (
        (writing, parsers.Violation),
        (starting, parsers.Violation),
        (hiding, parsers.Violation),
        (two_lines, AssertionError),
        (crashing, KeyError),
    ):
        monkeypatch.setitem(parsers.PARSERS, "config", parsers.PARSERS["config"]._replace(parse=broken))
        (tmp_path / "in").mkdir(exist_ok=True)
        with pytest.raises(expected):
            parsers.attempt("config", tmp_path / "in", b"{}")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_100_000_inputs_guided_by_coverage(tmp_path):
    pytest.importorskip("atheris")
    assert sum(parser.runs for parser in parsers.PARSERS.values()) >= LEAST
    done = subprocess.run(
        [sys.executable, str(FUZZ / "guided.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    print(done.stdout)
    assert not [result for result in results if result["broke"] or result["code"]], (
        "copy the inputs that failed to tests/robustness/fuzz/crashes/PARSER-HASH"
    )
    assert {
        result["parser"]: result["inputs"] >= parsers.PARSERS[result["parser"]].runs for result in results
    } == dict.fromkeys(parsers.PARSERS, True)
    assert done.returncode == 0, done.stderr[-2000:]
