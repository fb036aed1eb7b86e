"""Memory and open files stay constant over a long run with previews, checkpoints and evaluation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc"),
]
FEW = 256 * 1024  #: bytes per 1,000 steps that are measurement noise


def measure(folder: Path, steps: int, *leak: str) -> list[dict[str, int]]:
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.leaks", str(folder), str(steps), *leak],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache")},
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["evaluated"] == steps // 500
    return [sample for sample in result["samples"] if sample["step"] > steps / 5]  # after all lazy imports


def slope(samples: list[dict[str, int]], what: str) -> float:
    """Growth per 1,000 steps, of the line through the samples."""
    return float(np.polyfit([sample["step"] / 1000 for sample in samples], [sample[what] for sample in samples], 1)[0])


def test_memory_and_open_files_are_constant_over_3000_steps(tmp_path):
    samples = measure(tmp_path / "long", 3000)
    print({what: round(slope(samples, what), 1) for what in ("rss", "device", "files", "threads", "tensors")})
    assert slope(samples, "rss") < FEW and slope(samples, "device") < FEW
    for what, spread in (("files", 0), ("threads", 0), ("tensors", 4)):  # a batch that is being loaded has two tensors
        seen = [sample[what] for sample in samples]
        assert max(seen) - min(seen) <= spread, (what, seen)
    assert slope(samples, "tensors") < 0.5


def test_leak_is_detected(tmp_path):
    samples = measure(tmp_path / "leaking", 1000, "--leak")
    assert slope(samples, "rss") > 3e6 and slope(samples, "files") > 5 and slope(samples, "tensors") > 900
