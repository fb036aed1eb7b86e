"""`selftrans analyse`: features of a run ⇒ linear probes, PCA colour maps and t-SNE, as pictures and analyse.json.

Shape legend: N images, (C, *S) latent.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from selftrans.checkpoints.load import Weights, find_asked, load_model
from selftrans.data.dataset import Dataset
from selftrans.data.decoded import data_latents, decode_images
from selftrans.device import default_device
from selftrans.encoders.autoencoder import load_autoencoder
from selftrans.evaluate.fonts import class_names
from selftrans.evaluate.plots import INK, as_pictures, curves, middle_slices, pca_grid, save, scatter
from selftrans.evaluate.probes import can_be_probed, collect, held_out, linear_probe, pca_maps, tsne
from selftrans.experiments.reference import fitting_data
from selftrans.flow import PATHS
from selftrans.messages import plural
from selftrans.progress import progress_bar
from selftrans.storage import check_writable, write_json
from selftrans.types import Backbone, Cond, map_cond

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TIMES = (0.2, 0.4, 0.6)  #: of the noisy latents
MAPPED = 8  #: images whose features are shown as PCA maps


def analyse(
    origin: str | Path,
    out: Path,
    *,
    data: str | None,
    timesteps: Sequence[float],
    samples: int,
    weights: Weights,
    stage: str | None,
) -> dict[str, Any]:
    """Write probes per block and timestep, PCA maps and t-SNE of a run's features to `out`; returns analyse.json.

    Features are computed with the null condition, so that a probe cannot read the label from the conditioning. `data`:
    prepared data; None: the run's training data. Data without classes have no probes, with a warning if they have captions.
    ValueError for data of another shape or number of classes.
    """
    if samples < 20 or not timesteps:
        few = f"{plural(samples, 'sample')} at {plural(len(timesteps), 'timestep')}"
        raise ValueError(f"{few} are too few; give at least 20 samples and one timestep")
    loaded, device = load_model(find_asked(origin, stage=stage, weights=weights), stage=stage), default_device()
    model = loaded.model.to(device)
    dataset = fitting_data(origin, loaded, data, "the run", captions=False)
    check_writable(out / "analyse.json", size=1 << 20)
    decoder = load_autoencoder(loaded.autoencoder, device=device)
    z0, labels = data_latents(dataset, samples)
    probed, probes = _can_be_fitted(dataset, labels), dict[float, list[float]]()
    names = class_names(dataset.manifest.classes) or None
    blocks = list(range(1, model.depth + 1))
    middle = blocks[len(blocks) // 2]
    rows = {"data": as_pictures(middle_slices(decode_images(decoder, z0[:MAPPED].to(device))))}
    null, path = null_of(model, len(z0)), PATHS[loaded.config.train.path]
    for t in progress_bar(iterable=timesteps, desc="timesteps", unit="t"):
        feats = collect(model, z0, null, t=t, taps=blocks, path=path)
        if probed:
            probes[t] = [linear_probe(feats[k].to(device), labels) for k in blocks]
        rows |= {f"block {k}, t = {t:g}": pca_maps(feats[k][:MAPPED], model.grid) for k in _mapped_blocks(blocks)}
        title = f"t-SNE of block {middle} at t = {t:g}"
        save(scatter(tsne(feats[middle]), labels.numpy(), title=title, names=names), out / f"tsne-t{t:g}.png")
    title = "principal components of the features" + ", middle frame" * (len(model.grid) == 3)
    save(pca_grid(rows, title=title), out / "pca.png")
    chance = float(labels.bincount().max()) / len(labels)  # of always naming the most frequent class
    if probes:
        save(_accuracies(probes, chance, held_out(len(labels))), out / "probes.png")
    report = {
        "source": loaded.source,
        "stage": loaded.stage,
        "step": loaded.step,
        "images": len(labels),
        "data": str(dataset.path),
        "condition": "null",
        "blocks": blocks,
        "chance": chance if probes else None,
        "probe_accuracy": {f"{t:g}": accuracy for t, accuracy in probes.items()},
    }
    write_json(out / "analyse.json", report)
    return report


def _accuracies(probes: Mapping[float, Sequence[float]], chance: float, tested: int) -> Figure:
    """Accuracy of the probes of every block, a line for each t."""
    series = {f"t = {t:g}": (range(1, len(each) + 1), each) for t, each in probes.items()}
    figure = curves(series, xlabel="block", ylabel=f"linear probe accuracy, {plural(tested, 'sample')} held out")
    (axes,) = figure.axes
    axes.axhline(chance, color=INK, linewidth=0.8, linestyle=":", label=f"chance {chance:.2f}")
    axes.set_ylim(-0.03, 1.03)
    # above the axes: inside, curves near 1 leave it no place but on the line of chance
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)
    return figure


def _can_be_fitted(dataset: Dataset, labels: Tensor) -> bool:
    """Whether linear probes can be fitted; warns where captions, or too few pictures of a second class, prevent it."""
    classes = dataset.manifest.num_classes > 1
    if dataset.manifest.conditions.kind == "text":
        warnings.warn(f"no linear probes: {dataset.path} has captions, and no classes to be probed", stacklevel=3)
    elif classes and not can_be_probed(labels):
        warnings.warn("no linear probes: the pictures that they would be fitted on have one class", stacklevel=3)
    return classes and can_be_probed(labels)


def null_of(model: Backbone, count: int) -> Cond:
    """The null condition of `count` images, as one row in memory."""
    device = next(model.parameters()).device
    null = model.null(map_cond(lambda x: x.to(device), model.conditions.example()))
    return map_cond(lambda x: x.expand(count, *x.shape[1:]), null)


def _mapped_blocks(blocks: Sequence[int]) -> list[int]:
    """A shallow block, two middle blocks and the last one."""
    return sorted({blocks[round(fraction * (len(blocks) - 1))] for fraction in (0.15, 0.4, 0.7, 1.0)})
