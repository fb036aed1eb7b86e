"""The commands that measure: evaluate, classifier, analyse, quickstart, compare, bench. See `commands.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from selftrans.cli.options import (
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


@dataclass
class Evaluate(Command):
    """Distances between samples and a reference, in the features of an extractor: a table, and evaluate.json.

    SAMPLES is a folder, zip or npz of pictures (arr_0: uint8, NHWC; arr_1: their labels), or a run, checkpoint or weights
    file, which is sampled in memory; the options of `selftrans sample` apply to it.

    A run of text is sampled with --prompts, or with captions: one of each picture of the reference, if that is prepared data
    with captions, else of the run's training data.
    """

    samples: Positional[str]
    """pictures, or a run, checkpoint or weights file"""
    reference: str
    """folder, zip or npz of real pictures, prepared data, `digits`, or statistics (npz with mu and sigma, as ADM's)"""
    features: str | None = None
    """`inception` or its file of weights (.pth), `digits`, a classifier file made by `selftrans classifier`, or `values`: the
    numbers themselves; None: inception for pictures, values for data that are not pictures"""
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

        print(text(evaluate_samples(**self.options("sampling"), settings=self.sampling.given())))


@dataclass
class Classifier(Command):
    """Train a small classifier on prepared pixel data, to be used as `--features FILE` by evaluate."""

    data: Positional[str]
    """directory prepared with the `pixel` autoencoder"""
    out: Path
    """.safetensors file to write"""
    epochs: int = 12
    """passes over the data"""
    seed: int = 0
    """of its initial weights and of the order of the pictures"""

    def run(self) -> None:
        from selftrans.experiments.train_classifier import classifier_from_data

        print(classifier_from_data(**self.options()))


@dataclass
class Analyse(Command):
    """PCA maps, linear probes and t-SNE of a run's features, per block and timestep: pictures and analyse.json."""

    run_or_file: RunOrFile
    out: Path
    """directory for the pictures and analyse.json"""
    data: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """prepared data; None: what the run was trained on"""
    timesteps: tuple[float, ...] = (0.2, 0.4, 0.6)
    """t of the noisy latents; 0 is data, 1 is noise"""
    samples: int = 1000
    """images whose features are analysed"""
    weights: Weights = "ema"
    stage: Stage = None
    trust: Trust = ()

    def run(self) -> None:
        from selftrans.experiments.analyse_run import analyse

        report = analyse(self.run_or_file, **self.options("run_or_file"))
        probes = "probes.png, " if report["probe_accuracy"] else ""
        print(f"pca.png, {probes}tsne-*.png and analyse.json -> {self.out}")


@dataclass
class Quickstart(Command):
    """The method on real digits in minutes: vanilla, stage 1 and stage 2 at equal student steps, and a page about them."""

    out: Path = Path("quickstart")
    """directory for the runs and report.html"""
    steps: int | None = None
    """student steps of each method; None: as the recipe digits says"""
    seeds: tuple[int, ...] = (0,)
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
    OUT/<method>-seed<k>.
    """

    NO_OVERRIDES = ("recipe", "method")  # --methods takes its place

    recipe: Positional[str]
    """name of the recipe"""
    out: Path
    """directory for the runs and the report"""
    data: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """prepared data; recipes named digits... bring their own"""
    methods: tuple[str, ...] | None = None
    """names of methods; None: all built-in ones that need no external encoder, nor features of one"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """one run of each method for each"""
    steps: int | None = None
    """student steps of each method; None: as the recipe says"""
    images: int = 1000
    """samples for each distance"""
    features: str | None = None
    """extractor, by name or file; None: the digits' classifier, one trained on pixel data with classes, values for data that
    are not pictures, or inception"""
    workers: int | None = None
    """runs at the same time; None: one per core, one on a GPU"""
    trust: Trust = ()
    config: Annotated[Config, *Overrides] = tyro.MISSING
    typed: Typed = ()

    def run(self) -> None:
        from selftrans.experiments.compare import compare_methods, override

        config: Any = override(self.config, data=self.data, steps=self.steps)  # type: ignore[arg-type]
        compare_methods(config, **self.options("recipe", "config", "data", "steps"))


@dataclass
class Bench(Command):
    """Throughput on this machine, in one run: training steps next to a plain implementation, loading, sampling."""

    models: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="NAME [NAME ...]", aliases=("--model",))] = None
    """published sizes; None: SiT-S/2 and SiT-B/2, on a GPU SiT-XL/2 as well"""
    batch_size: int | None = None
    """images per step; None: by model and device"""
    tokens: int = 256
    """of an image, a square number"""
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

        print(table(bench(published(self.models, self.device, quick=self.quick), **self.options("models"))))
