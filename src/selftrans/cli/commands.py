"""The commands of `selftrans`: each a dataclass of its arguments with a `run`; heavy imports happen inside.

Here are the commands that make runs and images, plan runs, and show runs and the machine. `prepare_command.py` makes data,
`experiment_commands.py` measures, `interop_commands.py` is for files of other code.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from selftrans.cli.experiment_commands import Analyse, Autoencoder, Bench, Classifier, Compare, Evaluate, Quickstart
from selftrans.cli.interop_commands import Export, Import, ImportVae, Push
from selftrans.cli.options import (
    CONTINUES,
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
from selftrans.cli.prepare_command import Prepare
from selftrans.messages import as_word, escaped


@dataclass
class Train(RecipeCommand[Config]):
    """Train a recipe: the stages of its method, in order. The same command again continues the run.

    Every setting of a recipe can be overridden: `--train.steps 20000 --model.name=SiT-S/2`.
    """

    REPEATED = CONTINUES

    recipe: Positional[str]
    """name of the recipe"""
    out: Annotated[Path, tyro.conf.arg(metavar="RUN")]
    """run directory: created, or continued"""
    data: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """directory made by `selftrans prepare`, or its URL (s3://, https://, ...); sets --data.path. The recipes digits and
    digits_t2i bring their own data"""
    teacher: Annotated[str | None, tyro.conf.arg(metavar="RUN_OR_FILE")] = None
    """a run, checkpoint or weights file that teaches in place of this run's own first stage"""
    init: Annotated[str | None, tyro.conf.arg(metavar="RUN_OR_FILE")] = None
    """weights to start from: a run, checkpoint or weights file, or a published file; sets --init.path. --lora.rank R then
    trains adapters only"""
    dry_run: bool = False
    """build everything, take five steps of each stage (two where they take minutes), and say what the run takes (memory, time,
    disk); it writes nothing"""
    dry_run_json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """with --dry-run: also write what it says to this file, as json"""
    trust: Trust = ()
    config: Annotated[Config, *Overrides] = tyro.MISSING
    typed: Typed = ()

    def run(self) -> None:
        from selftrans.methods.registry import stages
        from selftrans.recipes import ignored
        from selftrans.storage import check_writable, write_json
        from selftrans.train.run import train
        from selftrans.train.run_report import held_out_line, totals

        if self.dry_run_json is not None:
            if not self.dry_run:
                raise ValueError("--dry-run-json belongs to --dry-run; give both")
            check_writable(self.dry_run_json)
        config: Any = self.config
        given = {"data.path": self.data, "init.path": self.init}
        config = config.override({name: value for name, value in given.items() if value is not None})
        if self.teacher is not None:
            option = next((stage.teacher.option for stage in stages(config) if stage.teacher), None)
            if option is None:
                warnings.warn(f"--teacher is ignored: method {config.method} has no teacher", stacklevel=2)
            else:
                config = config.override({option: self.teacher})
        for sentence in ignored(config):
            warnings.warn(sentence, stacklevel=2)
        if self.dry_run:
            from selftrans.train.dry_run import dry_run
            from selftrans.train.dry_run_report import text

            found = dry_run(config, self.out, typed=self.typed)
            if os.environ.get("RANK", "0") == "0":
                print(text(found))
                if self.dry_run_json is not None:
                    write_json(self.dry_run_json, asdict(found))
            return
        report = train(config, self.out, typed=self.typed)
        if os.environ.get("RANK", "0") == "0":
            print(f"{totals(report)} -> {escaped(self.out)}")
            if line := held_out_line(report):
                print(line)
            run = as_word(self.out)
            print(f"samples: selftrans sample {run} --out SAMPLES; curves and previews: selftrans ui {run}")


@dataclass
class Sample(Command):
    """Samples from a trained run: PNG or npy files, samples.npz (ADM layout), samples.json. Repeat the command to continue."""

    REPEATED = CONTINUES

    run_or_file: RunOrFile
    out: Path
    """directory for the images"""
    sampling: Annotated[SamplingOptions, Inline] = field(default_factory=SamplingOptions)
    size: str | None = None
    """HEIGHTxWIDTH of the pictures, or a side; None: as the model was made for"""
    text_encoder: TextEncoder = None
    weights: Weights = "ema"
    stage: Stage = None
    trust: Trust = ()

    def run(self) -> None:
        from selftrans.sampling.folder import class_line, sample_to_folder, summary_line

        options = self.options("run_or_file", "out", "sampling")
        made = sample_to_folder(self.run_or_file, self.out, self.sampling.given(), **options)
        if made:
            print(summary_line(self.out, made))
        if self.sampling.labels is not None and (line := class_line(self.out)):
            print(line)


@dataclass
class Plan(RecipeCommand[Config]):
    """What a run takes on many GPUs: batch, bytes on the wire, images/s, hours, memory, disk. Nothing is trained.

    The figures of one GPU come from `selftrans bench` on it (--measured bench/bench.json), or from --rate. What is assumed is
    listed; plan.json has the numbers. `selftrans train RECIPE --dry-run` measures a run on the machine at hand instead.
    """

    recipe: Positional[str]
    """name of the recipe"""
    gpus: int = 8
    """number of GPUs, in all machines"""
    measured: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """bench.json of one such GPU"""
    rate: float | None = None
    """images per second of the last stage on one GPU, in place of --measured"""
    gpus_per_machine: int = 8
    """GPUs of a machine"""
    link_gbps: float = 400.0
    """gigabits per second from one machine to the others"""
    local_gbps: float = 3600.0
    """gigabits per second from one GPU to the others of its machine"""
    data: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """prepared data, or the URL of such; None: as many latents as ImageNet has"""
    out: Path = Path("plan.json")
    """json file to write"""
    trust: Trust = ()
    config: Annotated[Config, *Overrides] = tyro.MISSING
    typed: Typed = ()

    def run(self) -> None:
        from selftrans.experiments.scale_plan import scale_plan, text
        from selftrans.experiments.step_cost import Cluster
        from selftrans.storage import check_writable, write_json

        config: Any = self.config
        if self.data is not None:
            config = config.override({"data.path": self.data})
        check_writable(self.out)
        cluster = Cluster(self.gpus, self.gpus_per_machine, self.link_gbps, self.local_gbps)
        found = scale_plan(config, cluster, measured=self.measured, rate=self.rate)
        print(text(found))
        write_json(self.out, asdict(found))


@dataclass
class Doctor(Command):
    """Versions, device, compilation, attention kernels and disk speed, as text to paste into a bug report."""

    folder: Path = Path()
    """where the speed of the disk is measured, by a temporary file of 64 MB: of the data or the runs"""
    json: bool = False
    """as json instead of text"""

    def run(self) -> None:
        import json

        from selftrans.experiments.doctor import examine, text

        found = examine(self.folder)
        print(json.dumps(found, indent=2) if self.json else text(found))


@dataclass
class Ui(Command):
    """A local page in the browser: runs live, next to each other, a playground, features, tables.

    RUNS are runs, or folders that hold runs and comparisons. The page reads them and never writes into them. A run appears
    there while it trains. With the folders of prepared data among RUNS, features of their pictures can be drawn. Needs
    `pip install 'selftrans[ui]'`.
    """

    runs: Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="[RUNS ...]")]] = ()
    """folders to show; none: `runs`, or the current one where there is no such folder"""
    port: int = 8377
    """port of the address; 0: any free one"""
    host: str = "127.0.0.1"
    """address to listen on. The default is reached from this machine only; any other needs --token"""
    token: str | None = None
    """secret that a browser must know, at least 12 characters; auto: a new one, which is part of the printed address. Also
    useful on a machine with several users"""
    device: Literal["cuda", "cpu"] | None = None
    """where the page samples; None: the GPU if there is one. cpu leaves the GPU to the training"""

    trust: Trust = ()

    def run(self) -> None:
        try:
            from selftrans.ui.serve import serve
        except ImportError as error:
            if error.name not in ("starlette", "uvicorn"):
                raise
            raise ImportError(f"the page needs {error.name}; install it: pip install 'selftrans[ui]'") from error
        serve(**self.options())


COMMANDS: dict[str, Any] = {
    "train": Train,
    "prepare": Prepare,
    "sample": Sample,
    "evaluate": Evaluate,
    "classifier": Classifier,
    "autoencoder": Autoencoder,
    "analyse": Analyse,
    "quickstart": Quickstart,
    "compare": Compare,
    "bench": Bench,
    "plan": Plan,
    "import": Import,
    "import-vae": ImportVae,
    "export": Export,
    "push": Push,
    "doctor": Doctor,
    "ui": Ui,
}
