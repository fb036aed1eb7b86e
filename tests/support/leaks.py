"""A long run of a tiny model that measures memory and open files every hundred steps; json on the last line.

    python -m tests.support.leaks FOLDER STEPS [--leak]
Previews, checkpoints and evaluation are on. `--leak` keeps a tensor at each step and a file at each sample, so that a test
can check that a leak is detected.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from selftrans.evaluate.classifier import SmallClassifier
from selftrans.experiments.evaluate_samples import evaluate_samples
from selftrans.train.run import train
from tests.support import toy

EVERY, EVALUATED = 100, 500  #: steps between two samples; between two evaluations
KEPT: list[Any] = []


def sample(step: int) -> dict[str, int]:
    """Memory, files, threads and tensors of the process, after garbage collection."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed memory
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "step": step,
        "rss": pages * os.sysconf("SC_PAGE_SIZE"),
        "device": torch.cuda.memory_allocated() if torch.cuda.is_available() else 0,
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "tensors": sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()),
    }


class Meter:
    """Replaces the progress bar, so that it is called once per step."""

    def __init__(self, run: Path, weights: Path, leak: bool) -> None:
        self.run, self.weights, self.leak = run, weights, leak
        self.step, self.samples, self.evaluated = 0, [], 0

    def __call__(self, **options: Any) -> Meter:
        return self

    def update(self, steps: int = 1) -> None:
        self.step += steps
        if self.leak:
            KEPT.append(torch.zeros(1000))
        if self.step % EVALUATED == 1 and self.step > 1:  # the checkpoint of the previous step exists
            evaluate_samples(self.run, toy.digits(), str(self.weights), settings={"num": 16, "steps": 2})
            self.evaluated += 1
        if self.step % EVERY == 2:
            if self.leak:
                KEPT.append(open(self.weights, "rb"))  # noqa: SIM115
            if (
                not self.samples
            ):  # what exists now, hundreds of thousands of objects, is neither searched nor counted again
                gc.collect()
                gc.freeze()
            self.samples.append(sample(self.step))

    def set_postfix(self, *_: Any, **__: Any) -> None:
        pass

    def close(self) -> None:
        pass


def main(folder: Path, steps: int, leak: bool) -> None:
    toy.quicken()
    torch.manual_seed(0)
    SmallClassifier(resolution=8, channels=1, num_classes=10, width=2, dim=8).save(folder / "classifier.safetensors")
    meter = Meter(folder / "run", folder / "classifier.safetensors", leak)
    small = {"model.width": 16, "model.depth": 2, "stage1.block": 1, "train.batch_size": 4, "train.accumulate": 1}
    often = {"train.checkpoint_every": 50, "train.preview_every": 50, "log.every": 10, "log.tensorboard": True}
    lengths = {"stage1.steps": 10, "train.steps": steps, "stage2.until_step": None}
    train(toy.toy(small | often | lengths | {"log.preview_images": 4}), folder / "run", bar=meter, quiet=True)
    print(json.dumps({"samples": meter.samples, "evaluated": meter.evaluated}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), "--leak" in sys.argv)
