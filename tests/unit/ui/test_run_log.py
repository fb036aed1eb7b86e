"""log.jsonl while it is written, continued, damaged; fewer points, with values computed by hand."""

import math
from types import SimpleNamespace

import pytest

from selftrans.train.log import JsonlLog
from selftrans.ui import run_log
from selftrans.ui.contained import Contained
from selftrans.ui.run_log import Columns, glance, reduced
from tests.support.ui_runs import line, write_log


@pytest.fixture
def file(tmp_path):
    return Contained(tmp_path.resolve(), ("run", "stage", "log.jsonl"))


def test_only_what_was_added_is_read(file):
    columns = Columns(file)
    columns.refresh()
    assert not columns.steps
    write_log(file.path, [line(1), line(2, extra=5.0), '{"step": 3, "lo'])
    columns.refresh()
    assert list(columns.steps) == [1, 2] and list(columns.values["loss"][1]) == [2, 2]
    assert [list(each) for each in columns.values["extra"]] == [[2], [5]]
    before = columns.offset
    with file.path.open("a") as opened:
        opened.write('ss": 7}\n')
    columns.refresh()
    assert list(columns.steps) == [1, 2, 3] and columns.last("loss") == 7 and columns.offset > before
    assert columns.last("extra") == 5 and columns.last("seconds") == 2 and columns.damaged == columns.replaced == 0


def test_a_run_that_is_continued_from_a_checkpoint_is_read_anew(file):
    write_log(file.path, [line(step) for step in range(1, 9)])
    columns = Columns(file)
    columns.refresh()
    log = JsonlLog(file.path, resume_step=4)  # drops steps 5 to 8, as training does
    for step in range(5, 11):
        log.write(line(step, loss=3.0))
    log.close()
    columns.refresh()
    assert list(columns.steps) == list(range(1, 11)) and columns.replaced == 1
    assert list(columns.values["loss"][1]) == [2] * 4 + [3] * 6


def test_damaged_lines_are_counted_and_the_others_kept(file, monkeypatch):
    monkeypatch.setattr(run_log, "CHUNK", 300)
    lines = [
        line(1),
        "\x00\x00 no json\n",
        "[1, 2]\n",
        '{"loss": 1}\n',
        '{"step": "x"}\n',
        "9" * 1000 + "\n",
        line(2, loss=math.nan),
        line(3),
    ]
    write_log(file.path, lines)
    columns = Columns(file)
    columns.refresh()
    assert list(columns.steps) == [1, 2, 3] and list(columns.values["loss"][0]) == [1, 3]
    assert columns.damaged >= 5
    file.path.unlink()
    columns.refresh()
    assert not columns.steps


def test_skipped_updates_are_collected(file):
    skip = {"step": 3, "loss": "nan", "grad_norm": "nan", "rows": [1, 2]}
    write_log(file.path, [line(2), line(4, skipped=1, skips=[skip, "odd"]), line(6, skipped=1)])
    columns = Columns(file)
    columns.refresh()
    assert columns.skipped == 1 and columns.skips == [skip]
    assert set(columns.curves(10)) == {"loss", "flow"}


def test_fewer_points_have_the_mean_and_the_range():
    steps, values = [1, 2, 4, 5, 6], [1.0, 3.0, 5.0, 6.0, 10.0]
    assert reduced(steps, values, 10) == {"x": [1, 2, 4, 5, 6], "y": [1, 3, 5, 6, 10]}
    # five values in two points: the first two, then three
    found = reduced(steps, values, 2)
    assert found == {"x": [2, 6], "y": [2, 7], "low": [1, 5], "high": [3, 10]}


def test_the_list_shows_the_end_without_reading_all(file, monkeypatch):
    monkeypatch.setattr(run_log, "TAIL", 2000)
    write_log(
        file.path, [*[line(10 * step, flow=1 / step, seconds=float(step)) for step in range(1, 1001)], '{"step": 1']
    )
    seen = glance(file)
    assert seen.step == 10_000 and seen.rate == pytest.approx(10) and seen.between == pytest.approx(1)
    xs, ys = zip(*seen.spark, strict=True)
    assert 40 <= len(xs) <= 2 * run_log.SPARK and list(xs) == sorted(xs) and xs[0] == 10 and xs[-1] == 10_000
    assert ys[0] == 1 and ys[-1] == pytest.approx(1 / 1000)
    assert glance(file / "none").step is None
    write_log(file.path, ["{}\n", "null\n"])
    assert glance(file) == run_log.Glance()


def test_a_last_line_that_is_long_is_found(file):
    """Of many skipped updates, with the rows of each batch."""
    skips = [{"step": k, "loss": "nan", "rows": list(range(1000))} for k in range(10)]
    write_log(file.path, [line(1), line(2, skipped=10, skips=skips)])
    assert file.path.stat().st_size > run_log.TAIL
    assert glance(file).step == 2 and glance(file).values["skipped"] == 10


def test_what_is_read_for_the_list_does_not_grow_with_the_log(file):
    """The bytes that are asked for; times would differ on a busy machine."""
    counts = []
    for lines in (1000, 10_000):
        write_log(file.path, [line(step) for step in range(1, lines + 1)])
        opened = Counted(file.open())
        assert glance(SimpleNamespace(open=lambda opened=opened: opened)).step == lines
        counts.append(opened.asked)
    assert counts[1] <= counts[0] + 4096


class Counted:
    """A file that counts the bytes that are asked for."""

    def __init__(self, file):
        self.file, self.asked, self.seek, self.fileno = file, 0, file.seek, file.fileno

    def read(self, size):
        self.asked += size
        return self.file.read(size)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()
