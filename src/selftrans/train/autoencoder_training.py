"""The training of an autoencoder in a folder: steps, checkpoints, resume.

FOLDER/checkpoints/step-...   weights, their average, AdamW's state, settings      FOLDER/log.jsonl   one line per report
Batches and noise are functions of (seed, step) alone, so a resumed training gives the same weights, bit for bit.
Shape legend: N batch, (C, H, W) picture in [-1, 1].
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from selftrans.checkpoints import format as checkpoint
from selftrans.data.dataset import Dataset
from selftrans.messages import plural
from selftrans.plain_json import to_plain
from selftrans.precision import PRECISIONS
from selftrans.progress import progress_bar
from selftrans.train.autoencoder_network import AutoencoderLoss, PerceptualDistance, build_autoencoder
from selftrans.train.autoencoder_settings import AutoencoderSettings
from selftrans.train.batches import Loaded, Stream, derived_seed, seed_step
from selftrans.train.ema import EMA
from selftrans.train.log import JsonlLog, RunningMeans, format_values
from selftrans.train.optim import load_optimizer, optimizer_tensors, set_learning_rate, update
from selftrans.train.signals import StopSignal

NOISE, ORDER = 0x5AE, 0x5AF  #: streams of random numbers, apart from those of other trainings of the same seed
KEEP = 2  #: checkpoints
FREE = {"steps"}  #: settings that may change when a training continues


class AutoencoderTraining:
    """Trains an autoencoder in `folder`, from its newest valid checkpoint if there is one.

    Args:
        settings: checked ones. data: pixels to train on. distance: the perceptual term, if there is one.
        every: steps from one checkpoint to the next. log_every: steps from one log line to the next.
    Raises ValueError when the folder was started with other settings or data.
    """

    def __init__(
        self,
        settings: AutoencoderSettings,
        data: Dataset,
        folder: Path,
        device: torch.device,
        *,
        distance: PerceptualDistance | None = None,
        every: int = 1000,
        log_every: int = 50,
        stop: StopSignal | None = None,
        bar: Callable[..., Any] = progress_bar,
    ) -> None:
        precision = settings.precision or ("bf16" if device.type == "cuda" else "fp32")
        settings, self.dtype = dataclasses.replace(settings, precision=precision), PRECISIONS[precision]
        self.settings, self.data, self.folder, self.device = settings, data, folder, device
        self.every, self.log_every, self.stop, self.bar = every, log_every, stop or StopSignal(), bar
        seed_step(settings.seed, NOISE, 0, 1, 0)
        side = max(max(shape[1:]) for shape in data.shapes)
        vae = build_autoencoder(settings, data.shapes[0][0], side)
        self.objective = AutoencoderLoss(vae, settings, distance and distance.to(device)).to(device)
        self.ema = EMA(cast(Any, vae), settings.ema)
        self.optimizer = torch.optim.AdamW(vae.parameters(), lr=settings.lr, weight_decay=0.0, fused=True)
        self.stream = Stream(
            data, batch_size=settings.batch_size, accumulate=1, seed=derived_seed(settings.seed, ORDER)
        )
        self.window, self.step, self.seconds = RunningMeans(), 0, 0.0
        self._good: list[Tensor] = []  #: for each update since the last log line whether it was finite, 0-d boolean
        self._restore()

    @property
    def vae(self) -> Any:
        """The averaged network, diffusers' AutoencoderKL."""
        return self.ema.model

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def run(self) -> None:
        """Train to the last step. `Interrupted` after a stop signal, with a checkpoint written."""
        last = self.settings.steps
        journal = JsonlLog(self.folder / "log.jsonl", resume_step=self.step)
        bar = self.bar(total=last, initial=self.step, desc="autoencoder", unit="step")
        try:
            batches = self.stream.from_step(self.step, pin=self.device.type == "cuda")
            while self.step < last:
                started = time.perf_counter()
                self._train_step(next(batches))
                self.seconds += time.perf_counter() - started
                bar.update()
                stopping = self.stop.received is not None
                if self.step % self.log_every == 0 or self.step == last:
                    self._log(journal, bar)
                if stopping or self.step == last or self.step % self.every == 0:
                    journal.sync()
                    self._save(required=stopping or self.step == last)
                if stopping and self.step < last:
                    raise self.stop.interrupted(self.step, self.folder)
        finally:
            bar.close()
            journal.close()
        # also here: an earlier process may have been killed between its last checkpoint and its removal of older ones
        checkpoint.prune(self.checkpoints, self.step, KEEP)

    def _train_step(self, loaded: Loaded) -> None:
        settings = self.settings
        self.objective.train()
        set_learning_rate(self.optimizer, settings.learning_rate(self.step))
        seed_step(settings.seed, NOISE, self.step, 0, 0)
        pixels = to_pixels(loaded.tensors["moments"], self.device)
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            loss, report = self.objective(pixels)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.objective.parameters(), settings.clip)
        good = torch.isfinite(loss.detach()) & torch.isfinite(norm)
        update(self.optimizer, good)
        self.optimizer.zero_grad(set_to_none=True)
        self.window.add(report | {"grad_norm": norm}, good)
        self._good.append(good)
        self.step += 1
        self.ema.update(self.step)

    def _log(self, journal: JsonlLog, bar: Any) -> None:
        """One line for the steps since the last one. FloatingPointError when all of their updates were skipped."""
        started = time.perf_counter()
        values = {name: float(value) for name, value in self.window.means().items()}
        # without updates an earlier process has written the line of this step
        good = torch.stack(self._good).sum().item() if self._good else 1
        skipped = len(self._good) - int(good) if self._good else 0
        self.seconds += time.perf_counter() - started  # waiting for the device counts as training
        if not good:
            raise FloatingPointError(
                f"the last {plural(skipped, 'update')} of the autoencoder, up to step {self.step}, had no finite gradient; "
                f"choose a lower --lr and another --out; checkpoints are in {self.checkpoints}"
            )
        if skipped:
            warnings.warn(
                f"{plural(skipped, 'update')} up to step {self.step} {'was' if skipped == 1 else 'were'} not finite and "
                "skipped",
                stacklevel=2,
            )
        self.window.clear()
        self._good.clear()
        rate = self.optimizer.param_groups[0]["lr"]
        line = {"step": self.step, **values, "lr": rate, "seconds": round(self.seconds, 3)}
        journal.write(line | ({"skipped": skipped} if skipped else {}))
        bar.set_postfix(format_values({k: v for k, v in values.items() if k != "grad_norm"}), refresh=False)

    def _save(self, *, required: bool) -> None:
        """Write a checkpoint. A full disk gives a warning, or an OSError if the training ends here."""
        tensors = {
            "autoencoder": dict(self.objective.vae.state_dict()),
            "ema": dict(self.vae.state_dict()),
            "optimizer": optimizer_tensors(self.optimizer, self.objective.vae),
        }
        if not all(bool(torch.isfinite(each).all()) for each in tensors["autoencoder"].values()):
            raise FloatingPointError(
                f"the weights of the autoencoder are not finite at step {self.step}; choose a lower --lr"
            )
        state = {"settings": to_plain(self.settings), "data": data_sha256(self.data), "seconds": self.seconds}
        state |= {"window": self.window.state(), "good": [bool(each) for each in self._good]}
        try:
            checkpoint.save(self.checkpoints, self.step, tensors, state, {"settings": state["settings"]})
            checkpoint.prune(self.checkpoints, self.step, KEEP)
        except OSError as error:
            if required:
                raise OSError(f"{error}; free disk space, then the same command continues") from error
            warnings.warn(f"{error}; training continues, earlier checkpoints stay valid", stacklevel=2)

    def _restore(self) -> None:
        found = checkpoint.newest(self.checkpoints)
        if found is None:
            return
        check_unchanged(found, self.settings, self.data, self.folder)
        self.step, self.seconds = found.step, float(found.state["seconds"])
        self.objective.vae.load_state_dict(found.tensors("autoencoder"))
        self.ema.model.load_state_dict(found.tensors("ema"))
        load_optimizer(self.optimizer, self.objective.vae, found.tensors("optimizer"))
        self.window.load(found.state["window"], self.device)
        self._good = [torch.tensor(each, device=self.device) for each in found.state["good"]]


def to_pixels(moments: Tensor, device: torch.device) -> Tensor:
    """Stored pixels (N, copies, C, H, W) => float32 pictures (N, C, H, W): one copy of each (mirrored or not), at random."""
    stored = moments.to(device, non_blocking=True)
    n, copies = stored.shape[:2]
    pixels = stored[torch.arange(n, device=device), torch.randint(copies, (n,), device=device)].float()
    # a GPU's convolutions are fastest in this layout, and keep it
    return pixels.contiguous(memory_format=torch.channels_last) if device.type == "cuda" else pixels


def data_sha256(data: Dataset) -> str:
    """sha256 that identifies the data of a training. The separator is the one in the checkpoints of all versions so far."""
    return data.manifest.shards_sha256(separator=" ")


def check_unchanged(found: checkpoint.Checkpoint, settings: AutoencoderSettings, data: Dataset, folder: Path) -> None:
    """ValueError when a training cannot continue from the checkpoint `found` with these settings and data."""
    before, now = dict(found.state.get("settings", {})), to_plain(settings)
    changed = [f"{name} was {before.get(name)}, is {now[name]}" for name in now if before.get(name) != now[name]]
    changed = [each for each in changed if each.split()[0] not in FREE]
    if changed:
        raise ValueError(f"{folder} was started with other settings: {'; '.join(changed)}; use those, or another --out")
    if found.state.get("data") != data_sha256(data):
        raise ValueError(
            f"{folder} was trained on other data than {data.path}; give the data it was trained on, or another --out"
        )
    if found.step > settings.steps:
        raise ValueError(
            f"{folder} has trained for {plural(found.step, 'step')} already, more than the {settings.steps} asked for; give "
            "at least as many, or another --out"
        )
