"""The command `selftrans`. Every command is a dataclass of its arguments with a `run`; heavy imports happen inside.

Exit status: 0 done, 1 an error said in one line, 2 wrong arguments, 75 stopped on notice with a checkpoint (run again).
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import io
import json
import os
import re
import sys
import typing
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from tyro.conf import Positional

VALUES = (tyro.conf.FlagConversionOff,)  #: overrides of a recipe are all written --a.b=c, also true and false


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
    weights: Literal["ema", "raw"] = "ema"
    stage: str | None = None
    """None: the last stage of the run"""

    def run(self) -> None:
        from selftrans.generate import generate

        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("run_or_file", "out", "weights", "stage"):
            del given[name]
        settings = {name: value for name, value in given.items() if value is not None}
        generate(self.run_or_file, self.out, settings, weights=self.weights, stage=self.stage)


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


@dataclass
class Quickstart:
    """The whole method on real digits in minutes: vanilla, stage 1 and stage 2 at equal student steps, and a page about it."""

    out: Path = Path("quickstart")
    steps: int | None = None
    """student steps of each method; None: as the recipe digits says"""
    seeds: tuple[int, ...] = (0,)
    images: int = 1000
    """samples for each distance"""

    def run(self) -> None:
        from selftrans.quickstart import quickstart

        quickstart(self.out, steps=self.steps, seeds=self.seeds, images=self.images)


COMMANDS: dict[str, Any] = {
    "prepare": Prepare,
    "sample": Sample,
    "evaluate": Evaluate,
    "classifier": Classifier,
    "analyse": Analyse,
    "quickstart": Quickstart,
}
TRAIN = "train a recipe: stage 1, then stage 2; rerun = resume"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Every error a user can mend is one line on stderr."""
    from selftrans.train.stop import RESUME_ME, Interrupted

    warnings.showwarning = _show_warning  # type: ignore[assignment]
    try:
        _dispatch(list(sys.argv[1:] if argv is None else argv))
    except Interrupted as stopped:
        print(f"selftrans: {stopped}", file=sys.stderr)
        return RESUME_ME
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        print(f"selftrans: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("selftrans: interrupted; the same command continues", file=sys.stderr)
        return 130
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def _show_warning(message: Warning | str, category: Any, filename: str, lineno: int, *_: Any) -> None:
    """Our own warnings are one line for people; those of libraries keep quiet."""
    if issubclass(category, UserWarning) and "selftrans" in filename:
        print(f"selftrans: warning: {message}", file=sys.stderr)


def _dispatch(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return
    if argv[0] in ("-V", "--version"):
        from selftrans import __version__

        print(f"selftrans {__version__}")
        return
    name, rest = argv[0], argv[1:]
    if name == "train":
        _train(rest)
    elif name in COMMANDS:
        _parse(COMMANDS[name], rest, f"selftrans {name}").run()
    else:
        raise _usage(f"command '{name}' is unknown", name, [*COMMANDS, "train"], "selftrans --help")


def _overview() -> str:
    lines = ["usage: selftrans COMMAND ...   (selftrans COMMAND --help teaches each)", ""]
    lines += [f"  {'train':<11} {TRAIN}"]
    lines += [f"  {name:<11} {inspect.getdoc(kind).splitlines()[0]}" for name, kind in COMMANDS.items()]  # type: ignore[union-attr]
    return "\n".join(lines)


def _usage(what: str, word: str, known: Sequence[str], where: str) -> SystemExit:
    """Print one line with the nearest known word and return the exit to raise."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    print(f"selftrans: {what}{f'; did you mean {close[0]}?' if close else ''} (see {where})", file=sys.stderr)
    return SystemExit(2)


def _parse(kind: Any, args: list[str], prog: str, default: Any = None, description: str | None = None) -> Any:
    """tyro, with its framed errors told in one line. With a `default`, the arguments are overrides of its fields."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            if default is None:
                return tyro.cli(kind, args=args, prog=prog)
            return tyro.cli(kind, args=args, prog=prog, default=default, description=description, config=VALUES)
    except SystemExit as stop:
        if stop.code:
            body = said.getvalue().split("─────\n")[-1] if "╭" not in said.getvalue() else said.getvalue()
            lines = [line.strip("│╭╮╰╯─ ") for line in body.splitlines() if not re.match(r"^[╭╰]", line)]
            end = next((i for i, line in enumerate(lines) if not line), len(lines))
            print(f"selftrans: {' '.join(lines[:end])} (see {prog} --help)", file=sys.stderr)
        raise


def _train(argv: list[str]) -> None:
    from selftrans.config import RunConfig
    from selftrans.recipes import RECIPES
    from selftrans.train.pipeline import train

    if not argv or argv[0] in ("-h", "--help"):
        print("usage: selftrans train RECIPE --out RUN [--data DIR] [--teacher RUN_OR_FILE] [--a.b=c ...]\n")
        print("  " + TRAIN + "; `selftrans train RECIPE --help` lists every override\n")
        for name, function in RECIPES.items():
            print(f"  {name:<17} {(function.__doc__ or '').splitlines()[0]}")
        return
    name, rest = argv[0], argv[1:]
    if name not in RECIPES:
        raise _usage(f"recipe '{name}' is unknown", name, list(RECIPES), "selftrans train --help")
    options, rest = _own_options(rest, ("data", "out", "teacher"))
    known = sorted(_dotted(RunConfig))
    for word in rest:
        flag = word.partition("=")[0]
        if flag.startswith("--") and flag != "--help" and flag[2:].replace("_", "-") not in known:
            names = [*known, "data", "out", "teacher"]
            raise _usage(f"override {flag} is unknown", flag[2:], names, f"selftrans train {name} --help")
    if not {"-h", "--help"} & set(rest) and "out" not in options:
        raise _usage("--out RUN is missing", "", [], "selftrans train --help")
    about = f"{inspect.getdoc(RECIPES[name])}\n\nBeside the overrides: --out RUN, --data DIR, --teacher RUN_OR_FILE."
    config: RunConfig = _parse(RunConfig, rest, f"selftrans train {name}", RECIPES[name](), about)
    if "data" in options:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=options["data"]))
    if "teacher" in options:
        config = dataclasses.replace(config, stage2=dataclasses.replace(config.stage2, teacher=options["teacher"]))
    report = train(config, options["out"])
    if os.environ.get("RANK", "0") != "0":
        return
    print(
        f"done: {report['student_steps']} student steps, {report['student_tflops']:.3g} TFLOPs; with all stages and the "
        f"teacher's training {report['total_tflops']:.3g} TFLOPs, {report['total_seconds']:.0f} s -> {options['out']}"
    )


def _own_options(argv: list[str], names: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
    """Take `--name value` and `--name=value` out of argv."""
    found: dict[str, str] = {}
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag[2:] in names and flag.startswith("--"):
            found[flag[2:]] = value if equals else next(words, "")
            if not found[flag[2:]] or found[flag[2:]].startswith("--"):
                raise _usage(f"{flag} needs a value", "", [], "selftrans train --help")
        else:
            rest.append(word)
    return found, rest


def _dotted(kind: Any, where: str = "") -> set[str]:
    """Every override that a configuration has, with dashes."""
    found = set()
    for name, hint in typing.get_type_hints(kind).items():
        dotted = f"{where}{name}".replace("_", "-")
        found |= _dotted(hint, f"{where}{name}.") if dataclasses.is_dataclass(hint) else {dotted}
    return found


if __name__ == "__main__":
    sys.exit(main())
