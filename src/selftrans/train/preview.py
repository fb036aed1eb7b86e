"""A sheet of samples from the EMA during training, with the same noise and labels each time for comparison."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from selftrans.config import RunConfig
from selftrans.data.dataset import Manifest
from selftrans.encoders.autoencoder import Autoencoder, load_autoencoder
from selftrans.evaluate.plots import sample_sheet, save_png
from selftrans.flow import PATHS
from selftrans.sampling.images import Sampler
from selftrans.storage import first_line, no_symlink
from selftrans.train.signals import StopSignal

TRIES = 3  #: times that a preview may end the process, for example out of memory, before it is skipped


class Preview:
    """Makes previews with Heun's method and the run's guidance. A preview that fails warns and never stops training."""

    def __init__(
        self, config: RunConfig, manifest: Manifest, device: torch.device, stop: StopSignal | None = None
    ) -> None:
        self.config, self.manifest, self.device, self.stop = config, manifest, device, stop or StopSignal()
        log = config.log
        self.settings = dataclasses.replace(
            config.sample, num=log.preview_images, sampler="heun", steps=log.preview_steps
        )
        self._autoencoder: Autoencoder | None = None

    def save(self, model: Any, path: Path, *, again: bool = False) -> None:
        """Sample with `model` (the EMA, in eval mode) and write a PNG; `again`: after a resume, if it is not there yet.

        A stop signal ends it at the next pass of the model. A preview that has ended the process TRIES times is not
        tried again.
        """
        tries = path.with_name(f".{path.stem}.tries")
        if again and path.exists():
            tries.unlink(missing_ok=True)  # the previous process ended after it had written the preview
            return
        if tries.exists() and tries.stat().st_size >= TRIES:
            warnings.warn(f"no preview at {path}: the process has ended {TRIES} times while making it", stacklevel=2)
            return
        hook = model.register_forward_pre_hook(self._unless_stopped)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(tries, "ab", opener=no_symlink) as file:
                file.write(b".")
            self._make(model, path)
        except Exception as error:  # the run continues, whatever a decoder raises
            warnings.warn(f"no preview at {path}: {first_line(error)}", stacklevel=2)
        finally:
            hook.remove()
        tries.unlink(missing_ok=True)

    def _unless_stopped(self, *_: object) -> None:
        if self.stop.received is not None:
            raise InterruptedError("asked to stop")

    def _make(self, model: Any, path: Path) -> None:
        if self._autoencoder is None:
            name = self.config.data.autoencoder or self.manifest.autoencoder
            self._autoencoder = load_autoencoder(name, device=self.device)
        # not `Sampler.of`: these are the EMA's own weights, which must be neither cast nor compiled
        path_on = PATHS[self.config.train.path]
        sampler = Sampler(model, self._autoencoder, self.settings, path_on, device=self.device)
        images = np.concatenate([batch.images for batch in sampler.sample()], axis=0)
        save_png(sample_sheet(images), path)
