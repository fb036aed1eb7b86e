"""`selftrans autoencoder`: prepared pixels ⇒ a trained autoencoder, a folder that diffusers and `prepare --autoencoder` load.

OUT/config.json, diffusion_pytorch_model.safetensors     the autoencoder, with the statistics of its latents
OUT/autoencoder.json, reconstructions.png, report.html   what it was trained on, figures on held-out pictures
OUT/training/                                            checkpoints, log.jsonl
Shape legend: (C, H, W) picture.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from selftrans.data.buckets import is_prepared, open_data
from selftrans.data.dataset import Dataset
from selftrans.data.views import split
from selftrans.device import default_device
from selftrans.encoders.identity import identity_kind
from selftrans.evaluate import plots
from selftrans.evaluate.classifier import SmallClassifier, weights_sha256
from selftrans.experiments.autoencoder_report import (
    count_measured,
    latent_statistics,
    page,
    reconstruction_figures,
    sheet,
)
from selftrans.messages import as_word, escaped, plural, printable, shape_text
from selftrans.plain_json import recorded, to_plain
from selftrans.progress import progress_bar
from selftrans.storage import (
    atomic_write,
    lock_file,
    remove_stale_temporaries,
    sha256_file,
    write_json,
    write_text,
)
from selftrans.train.autoencoder_network import PerceptualDistance
from selftrans.train.autoencoder_settings import CHECKPOINT_EVERY, AutoencoderSettings
from selftrans.train.autoencoder_training import AutoencoderTraining
from selftrans.train.log import read_log
from selftrans.train.processes import keep_memory
from selftrans.train.signals import StopSignal

WEIGHTS, CONFIG = "diffusion_pytorch_model.safetensors", "config.json"  #: diffusers' names
REPORT, PICTURE, PAGE, TRAINING = "autoencoder.json", "reconstructions.png", "report.html", "training"
SHOWN = 32  #: pictures on the sheet of reconstructions


def train_autoencoder(
    data: str | Path,
    out: str | Path,
    settings: AutoencoderSettings,
    *,
    checkpoint_every: int = CHECKPOINT_EVERY,
    log_every: int = 50,
    bar: Callable[..., Any] = progress_bar,
) -> dict[str, Any]:
    """Train an autoencoder on prepared pixels in the folder `out`; repeating the call continues it.

    Returns what OUT/autoencoder.json holds. `Interrupted` after a stop signal, with a checkpoint written. Raises ValueError,
    before anything is written, for data that are not prepared pixels, sides that `factor` does not divide, a classifier that
    does not fit, an `out` that holds something else, is in use, or has other settings.
    """
    out, device = Path(out), default_device()
    dataset = pixels_of(data)
    settings = settings.check()
    check_sides(dataset, settings.factor)
    distance = None
    if settings.perceptual is not None:
        classifier = SmallClassifier.load(settings.perceptual)
        distance = PerceptualDistance(classifier, dataset.manifest.shape[0])
        settings = dataclasses.replace(settings, perceptual=weights_sha256(classifier))
    _check_out(out)
    if device.type == "cpu":
        keep_memory()
    with lock_file(out / TRAINING / ".lock"), StopSignal() as stop:
        for folder in (out, out / TRAINING, out / TRAINING / "checkpoints"):
            remove_stale_temporaries(folder)
        kept, held_out = split(dataset, settings.held_out, settings.seed)
        training = AutoencoderTraining(
            settings, kept, out / TRAINING, device, distance=distance, every=checkpoint_every, log_every=log_every,
            stop=stop, bar=bar,
        )  # fmt: skip
        training.run()
        return _finish(training, out, held_out)


def pixels_of(data: str | Path) -> Dataset:
    """Prepared pixels. ValueError, with the command that makes them, for anything else."""
    first = "first `selftrans prepare SOURCE --out PIXELS`, without --autoencoder, then `selftrans autoencoder PIXELS`"
    if not is_prepared(data):
        raise ValueError(f"{printable(data)} is not a folder of prepared data; {first}")
    dataset = open_data(data)
    manifest = dataset.manifest
    if identity_kind(manifest.autoencoder) != "pixel":  # standardised pixels are stored as pixels, too
        raise ValueError(
            f"{data} holds latents by {printable(manifest.autoencoder)}, not the pixels of pictures; {first}"
        )
    if not len(dataset):
        raise ValueError(f"{data} holds no pictures; {first}")
    return dataset


def check_sides(dataset: Dataset, factor: int) -> None:
    """ValueError unless the factor divides the sides of all pictures."""
    for _, height, width in dataset.shapes:
        if height % factor or width % factor:
            near = shape_text([max(1, round(side / factor)) * factor for side in (height, width)])
            raise ValueError(
                f"pictures of {height}x{width} in {dataset.path} do not divide by the factor {factor}; choose another "
                f"--factor, or prepare them with --resolution {near}"
            )


def _check_out(out: Path) -> None:
    """ValueError unless `out` is empty, new, or the folder of an autoencoder; links in it are not followed."""
    training = out / TRAINING
    ours = training.is_dir() and not training.is_symlink() and not (training / "checkpoints").is_symlink()
    if out.exists() and not ours and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and holds something else; choose another --out, or remove it")


def _finish(training: AutoencoderTraining, out: Path, held_out: Dataset) -> dict[str, Any]:
    """Write the autoencoder, measured on held-out pictures, and the pages about it; the report comes last.

    A report of this step whose files are unchanged is returned as it is.
    """
    if before := _finished(training, out):
        return before
    vae, device, manifest = training.vae, training.device, training.data.manifest
    with training.bar(total=count_measured(training.data, held_out), desc="measuring", unit=" pictures") as bar:
        statistics = latent_statistics(vae, training.data, device, bar.update)
        figures = reconstruction_figures(vae, held_out, device, training.objective.distance, bar.update)
    config = json.loads(vae.to_json_string()) | {"latents_mean": statistics["mean"], "latents_std": statistics["std"]}
    # both are on disk before either is replaced
    with atomic_write(out / CONFIG) as text, atomic_write(out / WEIGHTS) as file:
        text.write(json.dumps(config, indent=2).encode())
        file.write(save({name: tensor.cpu().contiguous() for name, tensor in vae.state_dict().items()}))
    report = {
        "data": str(Path(training.data.path).resolve()),
        "source": manifest.source,
        "pictures": len(training.data),
        "picture": list(manifest.shape),
        "latent": [training.settings.channels, *(side // training.settings.factor for side in manifest.shape[1:])],
        "parameters": sum(p.numel() for p in vae.parameters()),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "steps": training.step,
        "seconds": round(training.seconds, 1),
        "held_out": figures,
        "latents": statistics,
        "settings": to_plain(training.settings),
        "sha256": {name: sha256_file(out / name) for name in (CONFIG, WEIGHTS)},
    }
    picture = sheet(vae, held_out, device, SHOWN)
    plots.save(picture, out / PICTURE)
    write_text(out / PAGE, page(report, read_log(training.folder / "log.jsonl"), picture))
    write_json(out / REPORT, report)
    return report


def _finished(training: AutoencoderTraining, out: Path) -> dict[str, Any] | None:
    """OUT/autoencoder.json of an earlier call, if it is of this step and the files that it describes are as they were."""

    def unchanged(report: dict[str, Any]) -> dict[str, Any] | None:
        same = (report["steps"], report["settings"]) == (training.step, to_plain(training.settings))
        same = same and all(sha256_file(out / name) == report["sha256"][name] for name in (CONFIG, WEIGHTS))
        return report if same and (out / PICTURE).is_file() and (out / PAGE).is_file() else None

    return recorded(out / REPORT, unchanged, None)


def summary(report: dict[str, Any], out: str | Path) -> str:
    """A few lines to print."""
    picture, latent = shape_text(report["picture"]), shape_text(report["latent"])
    figures = report["held_out"]
    distance = f", distance in features {figures['perceptual']:.4f}" if "perceptual" in figures else ""
    return (
        f"{picture} => {latent}, {report['parameters'] / 1e6:.2f} M parameters, {report['steps']:,} steps in "
        f"{report['seconds']:.0f} s\n"
        f"{plural(figures['pictures'], 'held-out picture')}: PSNR {figures['psnr']:.2f} dB, L1 {figures['l1']:.4f}{distance}\n"
        f"{escaped(out)} -> selftrans prepare SOURCE --out LATENTS --autoencoder {as_word(out)}"
    )
