"""The report of `selftrans autoencoder`: figures on held-out pictures, statistics of the latents, a page.

Shape legend: N batch, (C, H, W) picture in [-1, 1], D channels of a latent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selftrans.data.dataset import Dataset
from selftrans.encoders.autoencoder import to_uint8
from selftrans.evaluate.plots import Series, curves, figure_to_data_uri, sample_sheet
from selftrans.experiments.html_report import document, html_table, settings_table
from selftrans.messages import shape_text
from selftrans.train.autoencoder_network import PerceptualDistance, posterior

BATCH = 64
MOST = 20_000  #: pictures of which latents are measured


def picture_batches(dataset: Dataset, device: torch.device) -> Iterator[Tensor]:
    """At most MOST pictures (N, C, H, W), evenly spaced, not mirrored; each batch has one shape."""
    begin = 0
    for size, count in zip(dataset.parts, _counts(dataset), strict=True):
        rows = begin + np.arange(count) * size // max(count, 1)
        for at in range(0, count, BATCH):
            yield dataset.read(rows[at : at + BATCH], ["moments"])["moments"][:, 0].to(device).float()
        begin += size


def _counts(dataset: Dataset) -> list[int]:
    """Of each part, how many pictures are measured: all of them, or MOST in proportion to the sizes, rounded up."""
    share = min(1.0, MOST / max(len(dataset), 1))
    return [math.ceil(size * share) for size in dataset.parts]


def count_measured(*datasets: Dataset) -> int:
    """How many pictures of these data are measured."""
    return sum(sum(_counts(dataset)) for dataset in datasets)


@torch.inference_mode()
def reconstruction_figures(
    vae: Any,
    dataset: Dataset,
    device: torch.device,
    distance: PerceptualDistance | None = None,
    done: Callable[[int], object] = lambda count: None,
) -> dict[str, float]:
    """Means over pictures of PSNR (dB, of pictures in [0, 1]), of L1 (in [0, 1]) and of the distance in features, if given.

    Decoded is the mean of the posterior, clamped to [-1, 1]. `done` is called with the size of each batch.
    """
    vae.eval()
    found: dict[str, list[Tensor]] = {"psnr": [], "l1": []}
    for x in picture_batches(dataset, device):
        y = _decoded(vae, x)
        difference = (y - x).flatten(start_dim=1).double() / 2
        found["psnr"].append(-10 * difference.square().mean(dim=1).clamp(min=1e-10).log10())
        found["l1"].append(difference.abs().mean(dim=1))
        if distance is not None:
            found.setdefault("perceptual", []).append(distance(x, y))
        done(len(x))
    return {"pictures": count_measured(dataset)} | {
        name: torch.cat(values).mean().item() for name, values in found.items()
    }


def _decoded(vae: Any, x: Tensor) -> Tensor:
    """The decoded means of the posteriors of pictures (N, C, H, W)."""
    return vae.decode(posterior(vae, x).mean).sample.float().clamp(-1, 1)


@torch.inference_mode()
def latent_statistics(
    vae: Any, dataset: Dataset, device: torch.device, done: Callable[[int], object] = lambda count: None
) -> dict[str, Any]:
    """Mean and standard deviation of each channel (D,) of posterior samples, exactly: Var = Var(mean) + E(std^2).

    `posterior_std` is the root of E(std^2) alone. ValueError when a channel is constant.
    """
    vae.eval()
    sums, values, pictures = torch.zeros(3, vae.config.latent_channels, dtype=torch.float64, device=device), 0, 0
    for x in picture_batches(dataset, device):
        found = posterior(vae, x)
        mean = found.mean.double()
        sums += torch.stack([part.sum(dim=(0, 2, 3)) for part in (mean, mean.square(), found.var.double())])
        values, pictures = values + mean[:, 0].numel(), pictures + len(x)
        done(len(x))
    mean, square, noise = (sums / values).cpu()
    std = (square - mean.square() + noise).sqrt()
    if not bool(torch.isfinite(std).all()) or float(std.min()) < 1e-6:
        raise ValueError(f"the latents have channels without variance (std {std.tolist()}); train with a lower --lr")
    return {"mean": mean.tolist(), "std": std.tolist(), "posterior_std": noise.sqrt().tolist(), "pictures": pictures}


@torch.inference_mode()
def sheet(vae: Any, dataset: Dataset, device: torch.device, count: int) -> np.ndarray:
    """Originals, and below each its reconstruction: one picture, uint8 (height, width, C), of pictures of one shape."""
    vae.eval()
    largest = int(np.argmax(dataset.parts))
    begin, size = sum(dataset.parts[:largest]), dataset.parts[largest]
    count = min(count, size)
    columns = min(count, 8)
    rows = begin + np.arange(count) * size // count
    x = dataset.read(rows, ["moments"])["moments"][:, 0].to(device).float()
    white = x.new_ones(-count % columns, *x.shape[1:])  # in the last line
    lines = [torch.cat([part, white]).unflatten(0, (-1, columns)) for part in (x, _decoded(vae, x))]
    return sample_sheet(to_uint8(torch.stack(lines, dim=1).flatten(0, 2)).cpu().numpy(), columns)


def page(report: dict[str, Any], log: list[dict[str, Any]], picture: np.ndarray) -> str:
    """report.html: figures, reconstructions, the curve of the error, statistics of the latents, settings."""
    figures, latents = report["held_out"], report["latents"]
    names = [name for name in ("l1", "perceptual") if log and name in log[-1]]
    series: dict[str, Series] = {name: ([x["step"] for x in log], [x[name] for x in log]) for name in names}
    curve = curves(series, xlabel="steps", ylabel="in training", logy=True, size=(8, 3.6))
    numbers = {
        "held-out pictures": f"{figures['pictures']:,}",
        "PSNR": f"{figures['psnr']:.2f} dB",
        "L1 of pictures in [0, 1]": f"{figures['l1']:.4f}",
        **({"distance in features": f"{figures['perceptual']:.4f}"} if "perceptual" in figures else {}),
        "picture, latent": f"{shape_text(report['picture'])}, {shape_text(report['latent'])}",
        "parameters": f"{report['parameters']:,}",
        "trained on": f"{report['pictures']:,} pictures, {report['steps']:,} steps",
        "time": f"{report['seconds']:.0f} s on {report['device']}",
    }
    measures = ("mean", "std", "posterior_std")
    channels = [[str(k), *(f"{latents[name][k]:.4g}" for name in measures)] for k in range(len(latents["mean"]))]
    settings = {name: str(value) for name, value in report["settings"].items()}
    body = f"""<h1>Autoencoder</h1>
{settings_table(numbers)}
<h2>Held-out pictures, and below each its reconstruction</h2>
<img src="{figure_to_data_uri(picture)}" alt="pictures over their reconstructions">
<h2>Training</h2>
<img src="{figure_to_data_uri(curve)}" alt="error against steps">
<h2>Latents</h2>
{html_table(("channel", *measures), channels)}
<p class="note">Of posterior samples of {latents["pictures"]:,} training pictures. <code>prepare --autoencoder</code> brings
each channel to zero mean and unit variance with them. posterior_std is the part that is noise.</p>
<h2>Settings</h2>
{settings_table(settings)}
<p class="note">The same numbers are in <code>autoencoder.json</code> next to this page.</p>"""
    return document("selftrans autoencoder", body)
