"""The commands of `selftrans`, but for `train`: each a dataclass of its arguments with a `run`; heavy imports happen inside."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional


@dataclass
class Prepare:
    """Pictures to shards: centre-crop, resize, encode, store. Repeating the command continues it.

    SOURCE is a folder of class folders, a zip of class folders, a flat folder (unconditional), a parquet file, a
    data set on the hub, or the built-in `digits`.
    """

    source: Positional[str]
    out: Path
    """directory for the shards"""
    autoencoder: str = "pixel"
    """`pixel`, or a diffusers VAE by hub id or local path (e.g. stabilityai/sd-vae-ft-mse)"""
    resolution: int | None = None
    """side of the square pictures; None: as they are, if all are square and alike"""
    flip: bool = False
    """store the mirrored pictures too"""
    skip_bad: bool = False
    """go on after an unreadable picture, and list it"""
    batch_size: int = 64
    shard_size: int = 8192
    dtype: Literal["float16", "float32"] = "float16"
    """of the stored numbers"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """of the encoder"""
    split: str = "train"
    """of a parquet file or a data set on the hub"""
    label_column: str | None = None
    """of a parquet file or a data set on the hub; None: found by its type"""
    part: str = "1/1"
    """I/N: this process makes every Nth shard, others run the same command with another I (also on other machines)"""

    def run(self) -> None:
        from selftrans.data.encode import prepare

        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        options["precision"] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[self.precision]
        print(prepare(options.pop("source"), options.pop("out"), **options).summary())


@dataclass
class Sample:
    """Images from a trained run: a PNG folder, samples.npz (ADM layout) and samples.json. Repeating it continues."""

    run_or_file: Positional[str]
    """run directory, checkpoint or weights file"""
    out: Path
    num: int | None = None
    """images; None: as the recipe says, like every option below"""
    steps: int | None = None
    sampler: Literal["ode", "sde", "euler", "heun"] | None = None
    """ode is Heun's method, sde Euler-Maruyama"""
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    """t within which guidance is on; 0 is data, 1 is noise"""
    seed: int | None = None
    batch_size: int | None = None
    labels: Literal["balanced", "random"] | None = None
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    weights: Literal["ema", "raw"] = "ema"
    stage: str | None = None
    """None: the last stage of the run"""

    def run(self) -> None:
        from selftrans.generate import generate

        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("run_or_file", "out", "weights", "stage"):
            del given[name]
        settings = {name: value for name, value in given.items() if value is not None}
        made = generate(self.run_or_file, self.out, settings, weights=self.weights, stage=self.stage)
        if made:
            print(f"{made} images -> {self.out} (PNG files, samples.npz, samples.json)")


@dataclass
class Evaluate:
    """Distances between samples and a reference, in the features of an extractor. Writes evaluate.json beside them."""

    samples: Positional[str]
    """folder of pictures, zip, or npz with arr_0 (uint8, NHWC)"""
    reference: str
    """folder, zip or npz of real pictures, prepared data, `digits`, or statistics saved before"""
    features: str = "inception"
    """`inception`, `digits`, or a classifier file made by `selftrans classifier`"""

    def run(self) -> None:
        from selftrans.measure import evaluate_samples

        report = evaluate_samples(self.samples, self.reference, self.features)
        print(json.dumps(report, indent=2, ensure_ascii=False))


@dataclass
class Classifier:
    """Train a small classifier on prepared pixel data, to be used as `--features FILE` by evaluate."""

    data: Positional[str]
    """directory prepared with the `pixel` autoencoder"""
    out: Path
    """.safetensors file to write"""
    epochs: int = 12
    seed: int = 0

    def run(self) -> None:
        from selftrans.measure import classifier_from_data

        print(classifier_from_data(self.data, self.out, epochs=self.epochs, seed=self.seed))


@dataclass
class Analyse:
    """PCA maps, linear probes and t-SNE of a run's features, per block and timestep: pictures and analyse.json."""

    run_or_file: Positional[str]
    out: Path
    data: str | None = None
    """prepared data; None: what the run was trained on"""
    timesteps: tuple[float, ...] = (0.2, 0.4, 0.6)
    samples: int = 1000
    weights: Literal["ema", "raw"] = "ema"
    stage: str | None = None

    def run(self) -> None:
        from selftrans.measure import analyse

        analyse(
            self.run_or_file,
            self.out,
            data=self.data,
            timesteps=self.timesteps,
            samples=self.samples,
            weights=self.weights,
            stage=self.stage,
        )
        print(f"pca.png, probes.png, tsne-*.png and analyse.json -> {self.out}")


@dataclass
class Quickstart:
    """The whole method on real digits in minutes: vanilla, stage 1 and stage 2 at equal student steps, and a page about it."""

    out: Path = Path("quickstart")
    steps: int | None = None
    """student steps of each method; None: as the recipe digits says"""
    seeds: tuple[int, ...] = (0,)
    images: int = 1000
    """samples for each distance"""
    workers: int | None = None
    """runs side by side; None: one per core. With 1 it takes longer, and the seconds of the methods compare better"""

    def run(self) -> None:
        from selftrans.quickstart import quickstart

        quickstart(self.out, steps=self.steps, seeds=self.seeds, images=self.images, workers=self.workers)


@dataclass
class Bench:
    """Throughput on this machine, in one run: training steps beside the field's plain arithmetic, loading, sampling."""

    models: Annotated[tuple[str, ...] | None, tyro.conf.arg(aliases=("--model",))] = None
    """published sizes; None: SiT-S/2 and SiT-B/2, on a GPU SiT-XL/2 as well"""
    batch_size: int | None = None
    """images a step; None: by model and device"""
    tokens: int = 256
    """of an image, a square"""
    seconds: float = 300
    """for the steps of each model; at least three rounds are measured"""
    quick: bool = False
    """SiT-S/2 alone (if no model is named), within three minutes on two cores"""
    device: Literal["cpu", "cuda"] | None = None
    """None: a GPU if there is one"""
    out: Path = Path("bench")
    """directory for bench.json"""

    def run(self) -> None:
        from selftrans.bench import bench, published, table

        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        models = published(options.pop("models"), self.device, quick=self.quick)
        print(table(bench(models, **options)))


COMMANDS: dict[str, Any] = {
    "prepare": Prepare,
    "sample": Sample,
    "evaluate": Evaluate,
    "classifier": Classifier,
    "analyse": Analyse,
    "quickstart": Quickstart,
    "bench": Bench,
}
