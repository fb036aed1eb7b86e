"""log.jsonl for the page: only new lines are read, and curves are reduced to as many points as a screen shows.

Shape legend: L lines, P points.
"""

from __future__ import annotations

import json
import os
from array import array
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from selftrans.ui.contained import Contained, number

CHUNK = 4 << 20  #: bytes read at a time; a longer line is damage
COLUMNS, EVENTS = 64, 500  #: most values of a line, and most skipped updates, that are kept
CHECKED = 256  #: bytes before the offset of the next read; if they have changed, the log was replaced
SPARK, TAIL = 48, 16 << 10  #: points of the small curve in the list; bytes at the end that are read for it
NOT_CURVES = {"step", "seconds", "skipped", "tflops"}


class Columns:
    """The lines of a log as columns. `refresh` reads what was added; a log that was replaced is read anew."""

    def __init__(self, file: Contained) -> None:
        self.file, self.replaced = file, 0
        self._clear()

    def _clear(self) -> None:
        self.offset, self._before, self.damaged = 0, b"", 0
        self.steps = array("d")
        self.values: dict[
            str, tuple[array, array]
        ] = {}  #: name -> steps of the lines that have it, and its values there
        self.skips: list[dict[str, Any]] = []
        self.skipped = 0
        self._reduced: tuple[Any, dict[str, dict[str, list[float]]]] = (None, {})

    def refresh(self) -> None:
        """Read the complete lines that were added since. No error for a missing file: the columns are then empty."""
        try:
            with self.file.open() as file:
                self._read(file)
        except OSError:
            self._clear()

    def _read(self, file: BinaryIO) -> None:
        size = os.fstat(file.fileno()).st_size
        if self.offset:  # a run that is continued drops the lines after its checkpoint
            file.seek(self.offset - len(self._before))
            if size < self.offset or file.read(len(self._before)) != self._before:
                self.replaced += 1
                self._clear()
        file.seek(self.offset)
        rest = b""
        while piece := file.read(CHUNK):
            whole, newline, rest = (rest + piece).rpartition(b"\n")
            if newline:
                self._add(whole.splitlines())
                self.offset += len(whole) + 1
                self._before = (self._before + whole + newline)[-CHECKED:]
            elif len(rest) > CHUNK:
                self.damaged += 1
                self.offset += len(rest)
                self._before, rest = rest[-CHECKED:], b""

    def _add(self, lines: list[bytes]) -> None:
        for line in _parsed(lines):
            step = number(line.get("step")) if isinstance(line, dict) else None
            if step is None:
                self.damaged += 1
                continue
            self.steps.append(step)
            for name, value in line.items():
                found = number(value)
                if found is None or name == "step" or len(name) > 80:
                    continue
                if name in self.values or len(self.values) < COLUMNS:
                    steps, values = self.values.setdefault(name, (array("d"), array("d")))
                    steps.append(step)
                    values.append(found)
            self.skipped = max(self.skipped, int(number(line.get("skipped")) or 0))
            skips = line.get("skips")
            if isinstance(skips, list):
                self.skips += [each for each in skips if isinstance(each, dict)][: EVENTS - len(self.skips)]

    def last(self, name: str) -> float | None:
        """The last value of a column."""
        return self.values[name][1][-1] if name in self.values else None

    def curves(self, points: int) -> dict[str, dict[str, list[float]]]:
        """Each column reduced to at most `points`; `seconds` and counts are left out."""
        asked = (len(self.steps), points)
        if self._reduced[0] != asked:
            shown = {name: column for name, column in self.values.items() if name not in NOT_CURVES}
            self._reduced = asked, {name: reduced(*column, points) for name, column in shown.items()}
        return self._reduced[1]


def _parsed(lines: list[bytes]) -> list[Any]:
    """The json of each line; None for a damaged one. All at once where none is damaged, which is faster."""
    lines = [line for line in lines if line.strip()]
    try:
        found = list(json.loads(b"[" + b",".join(lines) + b"]"))
    except (ValueError, RecursionError):
        found = []
    return found if len(found) == len(lines) else [_json_or_none(line) for line in lines]


def _json_or_none(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def reduced(steps: Any, values: Any, points: int) -> dict[str, list[float]]:
    """A curve of L values in P points at most: x the last step of each, y the mean, low and high the range (if reduced)."""
    x, y = np.array(steps), np.array(values)
    if len(x) <= points:
        return {"x": _six_digits(x), "y": _six_digits(y)}
    starts = np.linspace(0, len(x), points, endpoint=False).astype(np.int64)
    ends = np.append(starts[1:], len(x))
    mean = np.add.reduceat(y, starts) / (ends - starts)
    low, high = np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)
    return {"x": _six_digits(x[ends - 1]), "y": _six_digits(mean), "low": _six_digits(low), "high": _six_digits(high)}


def _six_digits(values: np.ndarray) -> list[float]:
    """Numbers in six significant digits."""
    return [float(f"{value:.6g}") for value in values]


class Glance(NamedTuple):
    """What the list of runs shows of a log, without reading all of it."""

    step: float | None = None
    values: dict[str, float] = {}  # noqa: RUF012 - never changed
    rate: float | None = None  #: steps per second over the last lines
    spark: tuple[tuple[float, float], ...] = ()  #: (step, loss) of lines at equal distances in the file
    between: float | None = None  #: seconds of training between the last two lines


def glance(file: Contained) -> Glance:
    """Read the end of a log, and lines at SPARK places in it: the time does not depend on its length."""
    try:
        with file.open() as opened:
            size = os.fstat(opened.fileno()).st_size
            ends = _last_lines(opened, size, TAIL) or _last_lines(opened, size, CHUNK)  # a line with many skips is long
            places = range(0, size, max(1, size // SPARK)) if size > TAIL else ()
            lines = [line for place in places if (line := _line_at(opened, place)) is not None]
    except OSError:
        return Glance()
    if not ends:
        return Glance()
    lines = sorted((lines or ends) + ends[-1:], key=lambda line: float(line["step"]))
    last = ends[-1]
    rate, between = _rate(ends)
    found = {str(k): v for k, each in last.items() if (v := number(each)) is not None}
    spark = [(line["step"], v) for line in lines if (v := loss_of(line)) is not None]
    return Glance(float(last["step"]), found, rate, tuple(spark[:: max(1, len(spark) // SPARK)]), between)


def loss_of(values: dict[str, Any]) -> float | None:
    """The flow loss of a line, which all methods log; without one, its total loss."""
    flow = number(values.get("flow"))
    return number(values.get("loss")) if flow is None else flow


def _last_lines(file: BinaryIO, size: int, most: int) -> list[dict[str, Any]]:
    """The whole lines among the last `most` bytes."""
    file.seek(max(0, size - most))
    tail = file.read(most).rpartition(b"\n")[0]
    return [line for line in _parsed(tail.splitlines()) if _has_step(line)]


def _line_at(file: BinaryIO, place: int) -> dict[str, Any] | None:
    """The first whole line from `place` on."""
    file.seek(place)
    piece = file.read(2048)
    begin = piece.find(b"\n") + 1 if place else 0
    end = piece.find(b"\n", begin)
    found = _json_or_none(piece[begin:end]) if end > begin else None
    return found if _has_step(found) else None


def _has_step(line: Any) -> bool:
    return isinstance(line, dict) and number(line.get("step")) is not None


def _rate(lines: list[dict[str, Any]]) -> tuple[float | None, float | None]:
    """Steps per second over the last lines (at most 20), and the seconds between the last two."""
    timed = [(float(line["step"]), s) for line in lines[-20:] if (s := number(line.get("seconds"))) is not None]
    if len(timed) < 2:
        return (timed[0][0] / timed[0][1], None) if timed and timed[0][1] > 0 else (None, None)
    (first, began), (last, ended) = timed[0], timed[-1]
    rate = (last - first) / (ended - began) if ended > began and last > first else None
    return rate, max(0.0, ended - timed[-2][1])
