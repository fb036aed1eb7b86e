"""The commands of `selftrans`, but for `train`: each a dataclass of its arguments with a `run`; heavy imports happen inside."""

from __future__ import annotations

import dataclasses
import warnings
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
    dtype: Literal["float16", "float32"] | None = None
    """of the stored numbers; None: float16, and float32 with --autoencoder values"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """of the encoder"""
    split: str = "train"
    """of a parquet file or a data set on the hub"""
    label_column: str | None = None
    """of a parquet file or a data set on the hub; None: found by its type"""
    part: str = "1/1"
    """I/N: this process makes every Nth shard, others run the same command with another I (also on other machines)"""
    features: str | None = None
    """store the features of this vision model of transformers, too (hub id or local path), for --method repa; also for
    a folder that is complete already"""
    grid: int | None = None
    """of the features: GRID x GRID, one for each token of the students; None: half the latents' side, as for patch 2"""

    def run(self) -> None:
        from selftrans.data.prepare import prepare
        from selftrans.data.prepare_features import prepare_features

        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        source, out, features, grid = (options.pop(name) for name in ("source", "out", "features", "grid"))
        precision = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[self.precision]
        options["precision"] = "float32" if features and self.autoencoder == "pixel" else precision  # of a VAE
        if features and self.autoencoder == "values":
            raise ValueError("--features is for pictures; leave it out with --autoencoder values")
        if grid and not features:
            warnings.warn("--grid is ignored without --features", stacklevel=2)
        manifest = prepare(source, out, **options)
        print(manifest.summary())
        if features:
            options = {"batch_size": self.batch_size, "precision": precision, "part": self.part}
            print(prepare_features(source, out, features, grid=grid, **options).summary(manifest))


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
        from selftrans.sampling.folder import sample_to_folder

        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("run_or_file", "out", "weights", "stage"):
            del given[name]
        settings = {name: value for name, value in given.items() if value is not None}
        made = sample_to_folder(self.run_or_file, self.out, settings, weights=self.weights, stage=self.stage)
        if made:
            print(f"{made} images -> {self.out} (PNG files, samples.npz, samples.json)")


@dataclass
class Evaluate:
    """Distances between samples and a reference, in the features of an extractor: a table, and evaluate.json.

    SAMPLES is a folder, zip or npz of pictures (arr_0: uint8, NHWC; arr_1: their labels), or a run, checkpoint or weights
    file, which is sampled on the way, without touching the disk.
    """

    samples: Positional[str]
    reference: str
    """folder, zip or npz of real pictures, prepared data, `digits`, or statistics (npz with mu and sigma, as ADM's)"""
    features: str = "inception"
    """`inception` or its file of weights (.pth), `digits`, or a classifier file made by `selftrans classifier`"""
    out: Path | None = None
    """of the json report; None: beside the pictures, or in the run"""
    save_reference: Path | None = None
    """npz for the statistics of the reference, in ADM's layout"""
    num: int | None = None
    """images of a run; None: as the recipe says, like every option below (see selftrans sample)"""
    steps: int | None = None
    sampler: Literal["ode", "sde", "euler", "heun"] | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    seed: int | None = None
    batch_size: int | None = None
    labels: Literal["balanced", "random"] | None = None
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    weights: Literal["ema", "raw"] = "ema"
    stage: str | None = None

    def run(self) -> None:
        from selftrans.experiments.evaluate_samples import evaluate_samples, text

        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        where = {name: given.pop(name) for name in ("weights", "stage", "out", "save_reference")}
        settings = {name: value for name, value in list(given.items())[3:] if value is not None}
        print(text(evaluate_samples(self.samples, self.reference, self.features, settings=settings, **where)))


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
        from selftrans.experiments.train_classifier import classifier_from_data

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
        from selftrans.experiments.analyse_run import analyse

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
        from selftrans.experiments.quickstart import quickstart

        quickstart(self.out, steps=self.steps, seeds=self.seeds, images=self.images, workers=self.workers)


@dataclass
class Compare:
    """Methods x seeds under one budget: a table, the curves over steps and compute, and a page. Repeating it continues.

    RECIPE is one of `selftrans train --help`, and its overrides (--train.batch-size 64 ...) act on every method. Each run is
    an ordinary run directory, OUT/<method>-seed<k>.
    """

    recipe: Positional[str]
    out: Path
    data: str | None = None
    """prepared data; recipes named digits... bring their own"""
    methods: tuple[str, ...] = ("vanilla", "structure", "self_transcendence", "sra", "layersync", "dispersive")
    """structure is stage 1 alone; repa needs an encoder, or data prepared with --features"""
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int | None = None
    """student steps of each method; None: as the recipe says"""
    images: int = 1000
    """samples for each distance"""
    features: str | None = None
    """extractor, by name or file; None: the digits' classifier, one trained on pixel data with classes, or inception"""
    workers: int | None = None
    """runs side by side; None: one per core, one on a GPU"""
    config: tyro.conf.Suppress[Any] = None  #: the recipe with its overrides, filled in by cli.py

    def run(self) -> None:
        from selftrans.experiments.compare import compare_methods, override

        config = override(self.config, data=self.data, steps=self.steps)
        options = {name: getattr(self, name) for name in ("seeds", "images", "features", "workers")}
        compare_methods(config, self.out, self.methods, **options)


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
        from selftrans.experiments.bench import bench, published, table

        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        models = published(options.pop("models"), self.device, quick=self.quick)
        print(table(bench(models, **options)))


@dataclass
class Import:
    """A published checkpoint (SiT, REPA, Self-Transcendence) to a run: sample it, be taught by it, train it on.

    FILE is what their training writes (a .pt with model, ema, opt) or a plain state dict, also as safetensors. Nothing in
    it is run: a file that holds anything but tensors, plain containers and the options of a command is refused by name.
    Sizes and QK-norm are told from the tensors; SiT's time (0 is noise) is folded into the weights. Then `selftrans sample
    OUT` and `selftrans train RECIPE --teacher OUT` take it, and the command printed trains it on: with AdamW's state if the
    file has it, with any `--train...` of yours, by the flow loss alone (a stage-1 file of Self-Transcendence: with its head).
    """

    file: Positional[Path]
    out: Path
    """run directory to make; nothing else may be in it"""
    name: str | None = None
    """published size that is expected, such as SiT-XL/2; None: whatever it is"""
    convention: Literal["sit", "repa"] | None = None
    """sit (t = 0 is noise) or repa (t = 0 is data; also Self-Transcendence); None: told by the file or guessed, and said"""
    heads: int | None = None
    """attention heads; None: by q_norm, or as published for this width"""
    step: int | None = None
    """steps it was trained for; None: as the file says"""
    autoencoder: str | None = None
    """what decodes its latents; None: stabilityai/sd-vae-ft-mse for 4 channels, pixel for 1 or 3"""
    keep_heads: bool = False
    """keep projectors that have no place in the run, in projectors.safetensors"""

    def run(self) -> None:
        from selftrans.interop.importing import import_run

        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        import_run(options.pop("file"), options.pop("out"), **options)


@dataclass
class Export:
    """A run's weights as one safetensors file without heads, for selftrans or in the layout of SiT's or REPA's code.

    Writes OUT/model.safetensors and OUT/config.json. In a published layout the file holds what `SiT(**arguments)` of that
    repository loads, with `arguments` from config.json (REPA's with z_dims=[], so without projectors), and `selftrans import`
    reads it back. There is no diffusers layout: its DiT has other timestep frequencies and no QK-norm, so it would be
    another network.
    """

    run_or_file: Positional[str]
    out: Path
    weights: Literal["ema", "raw"] = "ema"
    layout: Literal["selftrans", "sit", "repa"] = "selftrans"
    """selftrans: in place of a run in every command; sit: t = 0 is noise; repa: t = 0 is data"""
    stage: str | None = None
    """None: the last stage of the run"""

    def run(self) -> None:
        from selftrans.interop.exporting import export_run

        made = export_run(self.run_or_file, self.out, weights=self.weights, layout=self.layout, stage=self.stage)
        print(f"{self.weights} weights, layout {self.layout} -> {made}")


COMMANDS: dict[str, Any] = {
    "prepare": Prepare,
    "sample": Sample,
    "evaluate": Evaluate,
    "classifier": Classifier,
    "analyse": Analyse,
    "quickstart": Quickstart,
    "compare": Compare,
    "bench": Bench,
    "import": Import,
    "export": Export,
}
