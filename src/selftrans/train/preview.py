"""A sheet of samples from the EMA during training, with the same noise and conditions each time for comparison.

The class or the prompt of each picture is written below it; `prompts.txt` has the prompts in full.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from selftrans.config import RunConfig
from selftrans.data.dataset import Dataset
from selftrans.data.manifest import Manifest
from selftrans.encoders.autoencoder import Autoencoder, load_autoencoder
from selftrans.evaluate import plots
from selftrans.evaluate.fonts import class_names
from selftrans.flow import PATHS
from selftrans.messages import first_line, printable
from selftrans.sampling.chosen_labels import NO_CLASS
from selftrans.sampling.conditioning import CaptionConditioning, Conditioning, conditioning_of, read_prompts
from selftrans.sampling.images import SampledBatch, Sampler
from selftrans.sampling.run_settings import applicable_settings
from selftrans.storage import no_symlink, write_text
from selftrans.train.signals import StopSignal

Attempt = Callable[[Callable[[], Any]], Any]  #: calls its argument, and may call it again if the device had no memory
TRIES = 3  #: times that a preview may end the process, for example out of memory, before it is skipped


class Preview:
    """Makes previews with Heun's method and the run's guidance. A preview that fails warns and never stops training."""

    def __init__(
        self, config: RunConfig, dataset: Dataset, device: torch.device, stop: StopSignal | None = None
    ) -> None:
        self.config, self.dataset, self.device, self.stop = config, dataset, device, stop or StopSignal()
        self.manifest = dataset.manifest
        log, sample = config.log, config.sample
        if sample.autoguidance is not None:  # the weaker model would take memory of the training
            sample = dataclasses.replace(sample, autoguidance=None, guidance_scale=1.0)
        self.settings = dataclasses.replace(
            sample,
            num=log.preview_images,
            sampler="heun",
            steps=log.preview_steps,
            prompts=run_prompts(config, dataset)[: log.preview_images] or None,
            capture="off",  # a preview is too short to record its passes, and the hook that stops one would not run
        )
        self._autoencoder: Autoencoder | None = None
        self._conditioning: Conditioning | None = None  #: kept, so that prompts are encoded once

    def save(self, model: Any, path: Path, *, again: bool = False, attempt: Attempt = lambda make: make()) -> None:
        """Sample with `model` (the EMA, in eval mode) and write a PNG.

        `again`: after a resume, where an existing file is kept. `attempt`: see `Attempt`. A stop signal ends the sampling at
        the next forward pass. A preview during which the process ended TRIES times is not tried again.
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
            attempt(lambda: self._make(model, path))
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
        if self._conditioning is None:
            self._conditioning = self._conditions()
        # not `Sampler.of`: these are the EMA's own weights, which must be neither cast nor compiled
        sampler = Sampler(
            model,
            self._autoencoder,
            applicable_settings(self.settings, model),
            PATHS[self.config.train.path],
            device=self.device,
            conditioning=self._conditioning,
        )
        batches = list(sampler.sample())
        images = np.concatenate([batch.images for batch in batches], axis=0)
        texts = captions(batches, self._conditioning, self.manifest.classes)
        plots.save(plots.sample_sheet(images, captions=texts), path)
        if self.settings.prompts:
            text = "".join(f"{printable(' '.join(prompt.split()), None)}\n" for prompt in self.settings.prompts)
            write_text(path.with_name("prompts.txt"), text)

    def _conditions(self) -> Conditioning:
        """The labels, the prompts of the run or, without these, captions with their stored tokens, without an encoder."""
        data = self.dataset
        if self.settings.prompts and self.config.sample.prompts is None:
            rows = data.prompt_rows[: len(self.settings.prompts)]
            return CaptionConditioning(data.random_access, device=self.device, rows=rows)
        # a text encoder on the CPU: there is no memory of the training device to spare
        conditions, encoder = data.manifest.conditions, self.config.data.text_encoder
        return conditioning_of(conditions, self.settings, present=data.present, text_encoder=encoder)


def with_prompts(config: RunConfig, manifest: Manifest) -> RunConfig:
    """The configuration with the lines of a file of prompts in place of its name, so that the run does not depend on it.

    ValueError for a file that cannot be read, and for prompts where the data have no text.
    """
    if config.sample.prompts is None:
        return config
    if manifest.conditions.kind != "text":
        raise ValueError(f"sample.prompts is for data with captions, these have {manifest.conditions}; leave it out")
    return config.override({"sample.prompts": read_prompts(config.sample.prompts)})


def run_prompts(config: RunConfig, dataset: Dataset) -> tuple[str, ...]:
    """The prompts of a run: those of its settings, or captions of its data; none where the data are of another kind."""
    return dataset.prompts if config.sample.prompts is None else config.sample.prompts


def captions(
    batches: Sequence[SampledBatch], conditioning: Conditioning, classes: Sequence[str] = ()
) -> list[str] | None:
    """The prompt of each image, or the name of its class; None if there are no conditions."""
    texts = [text for batch in batches for text in conditioning.texts(batch.indices) or ()]
    if texts or not classes:
        return texts or None
    names = [*class_names(classes), NO_CLASS]  # the null label comes after the classes
    return [names[label] for batch in batches for label in batch.labels.tolist()]
