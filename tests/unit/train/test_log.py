"""log.jsonl, running means, the progress bar."""

import torch

from selftrans.train.log import JsonlLog, RunningMeans, progress_bar
from tests.support.toy import quick  # noqa: F401 - a fixture


def test_progress_bar_prints_lines_without_a_terminal(capsys):
    bar = progress_bar(total=2, desc="stage1", unit="step")
    bar.update(2)
    bar.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("stage1:   0% 0/2") and lines[-1].startswith("stage1: 100% 2/2")


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
