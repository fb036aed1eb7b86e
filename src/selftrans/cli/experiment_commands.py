"""The commands that measure: evaluate, classifier, autoencoder, analyse, quickstart, compare, bench. See `commands.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from selftrans.cli.options import (
    CONTINUES,
    STARTS_AGAIN,
    Command,
    Config,
    Inline,
    Overrides,
    RecipeCommand,
    RunOrFile,
    SamplingOptions,
    Stage,
    TextEncoder,
    Trust,
    Typed,
    Weights,
)
from selftrans.messages import escaped
from selftrans.train.autoencoder_settings import CHECKPOINT_EVERY, AutoencoderSettings


@dataclass
class Evaluate(Command):
    """Distances between samples and a reference, in the features of an extractor: a table, and evaluate.json.

    SAMPLES is a folder, zip or npz of pictures (arr_0: uint8, NHWC; arr_1: their labels), or a run, checkpoint or weights
    file, which is sampled in memory; the options of `selftrans sample` apply to it.

    A run of text is sampled with --prompts, or with captions: one of each picture of the reference, if that is prepared data
    with captions, else of the run's training data.
    """

    REPEATED = f"{STARTS_AGAIN}; to be able to continue, make the pictures by `selftrans sample`, and give their folder"

    samples: Positional[str]
    """pictures, or a run, checkpoint or weights file"""
    reference: str
    """folder, zip or npz of real pictures, prepared data (also a URL), `digits`, or an npz of statistics (mu, sigma; ADM's)"""
    features: str | None = None
    """`inception` or its file of weights (.pth), `digits`, a classifier file made by `selftrans classifier`, a vision model of
    transformers (hub id or folder: facebook/dinov2-large), or `values`: the numbers themselves; None: inception for pictures,
    values for data that are not pictures"""
    out: Path | None = None
    """file for the json report; None: evaluate.json next to the pictures, or in the run"""
    save_reference: Path | None = None
    """npz for the statistics of the reference, in ADM's layout"""
    clip: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """also the CLIP score of pictures and their prompts, by this CLIPModel of transformers (hub id or folder)"""
    sampling: Annotated[SamplingOptions, Inline] = field(default_factory=SamplingOptions)
    text_encoder: TextEncoder = None
    weights: Weights = "ema"
    stage: Stage = None
    trust: Trust = ()

    def run(self) -> None:
        from selftrans.experiments.evaluate_samples import evaluate_samples, text

        evaluate_samples(
            **self.options("sampling"), settings=self.sampling.given(), show=lambda report: print(text(report))
        )


@dataclass
class Classifier(Command):
    """Train a small classifier on prepared pixel data, to be used as `--features FILE` by evaluate.

    The same command again continues.
    """

    REPEATED = CONTINUES

    data: Positional[str]
    """directory prepared with the `pixel` autoencoder"""
    out: Path
    """.safetensors file to write"""
    epochs: int = 12
    """passes over the data"""
    seed: int = 0
    """seed of the initial weights and of the order of the pictures"""

    def run(self) -> None:
        from selftrans.experiments.train_classifier import classifier_from_data

        print(classifier_from_data(**self.options()))


@dataclass
class Autoencoder(Command):
    """Train a small variational autoencoder on your own pictures, for latents where no published VAE fits.

    DATA is a folder of pixels: what `selftrans prepare SOURCE --out DATA` writes without --autoencoder. OUT becomes a folder
    that diffusers' AutoencoderKL.from_pretrained loads, and `selftrans prepare SOURCE --out LATENTS --autoencoder OUT` then
    stores latents, each channel of zero mean and unit variance. Some pictures are held out: reconstructions.png shows them
    over their reconstructions, autoencoder.json and report.html have PSNR and L1. The same command again continues.
    """

    REPEATED = CONTINUES

    data: Positional[Path]
    """prepared pixels"""
    out: Path
    """folder to make"""
    settings: Annotated[AutoencoderSettings, Inline] = field(default_factory=AutoencoderSettings)
    checkpoint_every: int = CHECKPOINT_EVERY
    """steps from one checkpoint to the next"""

    def run(self) -> None:
        from selftrans.experiments.train_autoencoder import summary, train_autoencoder

        print(summary(train_autoencoder(**self.options()), self.out))


#: options of `Analyse` that only --target reads
OF_TARGET = ("blocks", "scales", "encoder", "grid", "seed")


@dataclass
class Analyse(Command):
    """PCA maps, linear probes and t-SNE of a run's features, per block and timestep: pictures and analyse.json.

    With --target: what the features that a teacher offers to a student consist of, per block and strength of guidance w: how
    much of f_g = f_u + w (f_c - f_u) a table by label explains, its size, what probes read from it with and without the label
    that it was computed with, and maps. Writes target.json, target.png and target-maps.png. A run with a stage that is taught
    is represented by its teacher. RUN_OR_FILE may then also be prepared data with stored features, or with --encoder a vision
    model.
    """

    run_or_file: RunOrFile
    out: Path
    """directory for the pictures and the json"""
    data: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """prepared data, or its URL; None: what the run was trained on"""
    timesteps: Annotated[tuple[float, ...] | None, tyro.conf.arg(metavar="T [T ...]", aliases=("--t",))] = None
    """t of the noisy latents; 0 is data, 1 is noise; None: 0.2 0.4 0.6, with --target 0.4 0.5 0.6 0.7 (probes at the first)"""
    samples: Annotated[int, tyro.conf.arg(aliases=("--images",))] = 1000
    """images whose features are analysed; --target holds a quarter of them out"""
    weights: Annotated[
        Literal["ema", "raw"] | None,
        tyro.conf.arg(
            help="ema: the moving average; raw: the weights themselves; None: ema, with --target those that teach"
        ),
    ] = None
    stage: Stage = None
    target: bool = False
    """analyse what a teacher offers to a student"""
    blocks: Annotated[tuple[int, ...] | None, tyro.conf.arg(metavar="K [K ...]")] = None
    """with --target: blocks of the teacher (1-based); None: all, or eight of a deep model"""
    scales: Annotated[tuple[float, ...], tyro.conf.arg(metavar="W [W ...]", aliases=("--w",))] = (
        1.0,
        2.0,
        5.0,
        10.0,
        30.0,
    )
    """with --target: w, strengths of guidance on the features"""
    encoder: bool = False
    """with --target: RUN_OR_FILE is a vision model of transformers (hub id or folder), as REPA uses; needs --data"""
    grid: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """with --encoder: side of its grid of features; None: half the side of the latents"""
    seed: int = 0
    """with --target: seed of the choice of images and of noise"""
    trust: Trust = ()

    def run(self) -> None:
        if self.target:
            self.of_target()
            return
        plain = type(self)(self.run_or_file, self.out)
        for name in OF_TARGET:
            if getattr(self, name) != getattr(plain, name):
                raise ValueError(f"--{name} belongs to --target; give both")
        from selftrans.experiments.analyse_run import TIMES, analyse

        options = self.options("run_or_file", "target", *OF_TARGET)
        options |= {"timesteps": TIMES if self.timesteps is None else self.timesteps, "weights": self.weights or "ema"}
        report = analyse(self.run_or_file, **options)
        probes = "probes.png, " if report["probe_accuracy"] else ""
        print(f"pca.png, {probes}tsne-*.png and analyse.json -> {escaped(self.out)}")

    def of_target(self) -> None:
        from selftrans.experiments.analyse_target import TIMES, analyse_target
        from selftrans.experiments.target_report import table

        options = self.options("run_or_file", "target")
        options["timesteps"] = TIMES if self.timesteps is None else self.timesteps
        analyse_target(self.run_or_file, **options, show=lambda report: print(table(report)))
        print(f"target.png, target-maps.png and target.json -> {escaped(self.out)}")


@dataclass
class Quickstart(Command):
    """The method on real digits in minutes: vanilla, stage 1 and stage 2 at equal student steps and at equal compute.

    Writes a page with the outcome in one sentence, a figure and a table. One seed takes about four minutes of two cores.
    """

    REPEATED = CONTINUES

    out: Path = Path("quickstart")
    """directory for the runs and report.html"""
    steps: int | None = None
    """student steps of each method; None: 800. Vanilla goes on to the compute of both stages"""
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(metavar="SEED [SEED ...]")] = (0,)
    """one run of each method for each"""
    images: int = 1000
    """samples for each distance"""
    workers: int | None = None
    """runs at the same time; None: one per core. With 1 it takes longer, and the methods' seconds compare better"""

    def run(self) -> None:
        from selftrans.experiments.quickstart import quickstart

        quickstart(**self.options())


@dataclass
class Compare(RecipeCommand[Config]):
    """Methods x seeds with equal budgets: a table, the curves over steps and compute, and a page. Repeating it continues.

    The overrides of RECIPE (--train.batch-size 64 ...) apply to every method. Each run is an ordinary run directory,
    OUT/<method>-seed<k>. A run that diverges or runs out of memory does not end the others: it is named with the reason, the
    exit status is 1, and the same command tries it again.
    """

    REPEATED = CONTINUES

    HAS_METHOD = False  # --methods takes its place

    recipe: Positional[str]
    """name of the recipe"""
    out: Path
    """directory for the runs and the report"""
    data: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """prepared data, or its URL; recipes named digits... bring their own"""
    methods: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="METHOD [METHOD ...]")] = None
    """names of methods; None: all built-in ones that need no external encoder, nor features of one"""
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(metavar="SEED [SEED ...]")] = (0, 1, 2)
    """one run of each method for each"""
    steps: int | None = None
    """student steps of each method; None: as the recipe says"""
    images: int = 1000
    """samples for each distance"""
    features: str | None = None
    """extractor, as `evaluate` takes it; None: the digits' classifier, one trained on pixel data with classes, values for data
    that are not pictures, or inception"""
    workers: int | None = None
    """runs at the same time, which divide the cores (or OMP_NUM_THREADS each); None: one per core, one on a GPU"""
    trust: Trust = ()
    config: Annotated[Config, *Overrides] = tyro.MISSING
    typed: Typed = ()

    def run(self) -> None:
        from selftrans.experiments.comparison.compare import compare_methods
        from selftrans.experiments.comparison.comparison_settings import override
        from selftrans.messages import plural

        config: Any = override(self.config, data=self.data, steps=self.steps)  # type: ignore[arg-type]
        summary = compare_methods(config, **self.options("recipe", "config", "data", "steps"))
        if failed := len(summary["failed"]):
            raise ValueError(
                f"{plural(failed, 'run')} failed (the table above and compare.json say why); the same command tries again"
            )


@dataclass
class Bench(Command):
    """Throughput on this machine, in one run: training steps next to a plain implementation, loading, sampling."""

    models: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="NAME [NAME ...]", aliases=("--model",))] = None
    """published sizes; None: SiT-S/2 and SiT-B/2, on a GPU SiT-XL/2 as well"""
    batch_size: int | None = None
    """images per step; None: by model and device"""
    tokens: int = 256
    """tokens of an image, a square number"""
    seconds: float = 300
    """seconds for the steps of each model; at least three rounds are measured"""
    rows: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="NAME [NAME ...]")] = None
    """what is measured, of vanilla, stage1, stage2, plain_vanilla, plain_stage2, and captured_vanilla, captured_stage1,
    captured_stage2 (train.capture); None: the first five"""
    limit: float | None = None
    """seconds for each model in all, compilation included; sampling and loading are left out near
    its end; None: no limit"""
    quick: bool = False
    """SiT-S/2 alone (if no model is named), within three minutes on two cores"""
    device: Literal["cpu", "cuda"] | None = None
    """None: a GPU if there is one"""
    out: Path = Path("bench")
    """directory for bench.json"""

    def run(self) -> None:
        from selftrans.experiments.bench import bench, published
        from selftrans.experiments.bench.text_table import table

        print(table(bench(published(self.models, self.device, quick=self.quick), **self.options("models"))))
