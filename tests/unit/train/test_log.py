"""log.jsonl, running means."""

import json

import torch

from selftrans.train.log import JsonlLog, RunningMeans, format_values, read_log
from tests.support.toy import quick  # noqa: F401 - a fixture


def test_log_is_truncated_to_the_resumed_step(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 2}\n{"step": 4}\n{"step": 6}\n\n{"other": 1}\nnonsense\n{"step": 8')
    log = JsonlLog(path, resume_step=4)
    log.write({"step": 5})
    log.close()
    assert path.read_text() == '{"step": 2}\n{"step": 4}\n{"step": 5}\n'


BAD = float("nan")


def test_running_means_exclude_skipped_steps():
    window = RunningMeans()
    window.add({"a": torch.tensor(1.0)}, torch.tensor(True))
    window.add({"a": torch.tensor(BAD)}, torch.tensor(False))
    window.add({"a": torch.tensor(4.0)})
    assert float(window.means()["a"]) == 2.5 and window.state() == {"a": [5.0, 2.0]}


def test_numbers_count_as_tensors_do():
    """Sums in the same order and precision, also when a window begins with tensors."""
    values = [(0.1, True), (BAD, False), (1 / 3, True), (1e9, True)]
    tensors, numbers, both = (RunningMeans() for _ in range(3))
    for i, (value, finite) in enumerate(values):
        exact = torch.tensor(value, dtype=torch.float64)
        tensors.add({"a": exact}, torch.tensor(finite))
        numbers.add_numbers({"a": value}, finite)
        both.add({"a": exact}, torch.tensor(finite)) if i < 2 else both.add_numbers({"a": value}, finite)
    assert tensors.state() == numbers.state() == both.state() == {"a": [0.1 + 1 / 3 + 1e9, 3.0]}
    assert float(numbers.means()["a"]) == float(tensors.means()["a"])
    numbers.clear()
    numbers.add_numbers({"a": BAD}, False)
    assert numbers.state() == {"a": [0.0, 0.0]} and numbers.means()["a"].isnan()


def test_running_means_are_the_same_after_a_resume():
    window, resumed = RunningMeans(), RunningMeans()
    for value in (1.0, 2.0):
        window.add({"a": torch.tensor(value), "b": torch.tensor(-value)})
    resumed.load(json.loads(json.dumps(window.state())), torch.device("cpu"))
    for means in (window, resumed):
        means.add({"a": torch.tensor(6.0)})
    assert {name: float(mean) for name, mean in resumed.means().items()} == {"a": 3.0, "b": -1.5}
    assert resumed.state() == window.state()
    window.clear()
    assert window.means() == {} and window.state() == {}


def test_log_is_read_as_it_was_written_and_a_missing_log_is_empty(tmp_path):
    assert read_log(tmp_path / "absent.jsonl") == []
    log = JsonlLog(tmp_path / "run" / "log.jsonl", resume_step=0)
    lines = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1e-12}]
    for line in lines:
        log.write(line)
    log.sync()
    assert read_log(tmp_path / "run" / "log.jsonl") == lines
    log.close()


def test_bar_shows_three_significant_figures():
    assert format_values({"loss": 0.123456, "lr": 1e-5, "norm": 1234.5}) == {
        "loss": "0.123",
        "lr": "1e-05",
        "norm": "1.23e+03",
    }
