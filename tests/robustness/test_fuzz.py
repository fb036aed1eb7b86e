"""Every parser of a stranger's file against inputs that nobody thought of: mutated, guided by coverage, and remembered.

`fuzz/parsers.py` says what a parser may do: return, or raise ValueError in one line. Nothing else may leave it, nothing may
be written beside its folder, no process started, no connection opened, no name looked up for a pickle.
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
    """A sound example with some bytes changed, left out, doubled, or put in from elsewhere."""
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
def test_a_mutated_file_is_read_or_refused_in_a_line(name):
    with parsers.room(name) as folder:

        @settings(
            max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
        )
        @given(mutated(parsers.PARSERS[name].examples()))
        def one(data: bytes) -> None:
            parsers.attempt(name, folder, data)

        one()


@pytest.mark.parametrize("name", parsers.PARSERS)
def test_sound_examples_are_read_and_rubbish_is_not(name):
    with parsers.room(name) as folder:
        assert all(parsers.attempt(name, folder, data) for data in parsers.PARSERS[name].examples())
        if name not in ("log", "shard_record"):  # lines and records that are none are made again
            assert not parsers.attempt(name, folder, b"\x89nothing of the kind")


@pytest.mark.parametrize("path", CRASHES, ids=[path.name for path in CRASHES])
def test_what_once_broke_a_parser_does_so_no_more(path):
    name = path.name.rpartition("-")[0]
    with parsers.room(name) as folder:
        parsers.attempt(name, folder, path.read_bytes())


def test_a_parser_that_trespasses_is_noticed(tmp_path, monkeypatch):
    def trespassing(path: Path) -> object:
        return (path.parent.parent / "elsewhere").write_text("x")

    def talkative(path: Path) -> object:
        raise ValueError("one\ntwo")

    def starting(path: Path) -> object:
        return subprocess.Popen(["true"])

    def secretive(path: Path) -> object:
        with contextlib.suppress(Exception):
            trespassing(path)
        raise ValueError("one line")

    def crashing(path: Path) -> object:
        raise KeyError("x")

    for broken, expected in (
        (trespassing, parsers.Trespass),
        (starting, parsers.Trespass),
        (secretive, parsers.Trespass),
        (talkative, AssertionError),
        (crashing, KeyError),
    ):
        monkeypatch.setitem(parsers.PARSERS, "config", parsers.PARSERS["config"]._replace(parse=broken))
        (tmp_path / "in").mkdir(exist_ok=True)
        with pytest.raises(expected):
            parsers.attempt("config", tmp_path / "in", b"{}")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_hundred_thousand_inputs_guided_by_coverage(tmp_path):
    pytest.importorskip("atheris")
    assert sum(parser.runs for parser in parsers.PARSERS.values()) >= LEAST
    done = subprocess.run(
        [sys.executable, str(FUZZ / "guided.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    print(done.stdout)
    assert not [one for one in found if one["broke"] or one["code"]], (
        "copy what broke into tests/robustness/fuzz/crashes/PARSER-HASH"
    )
    assert {one["parser"]: one["inputs"] >= parsers.PARSERS[one["parser"]].runs for one in found} == dict.fromkeys(
        parsers.PARSERS, True
    )
    assert done.returncode == 0, done.stderr[-2000:]
