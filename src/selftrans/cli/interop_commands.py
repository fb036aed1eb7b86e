"""The commands for files of other code, and for the hub: import, import-vae, export, push. See `commands.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from selftrans.cli.options import CONTINUES, Command, RunOrFile, Stage, Trust, Weights
from selftrans.messages import escaped


@dataclass
class Import(Command):
    """A published checkpoint (SiT, DiT, LightningDiT, MMDiT, REPA, Self-Transcendence, diffusers) to a run.

    FILE is what their training writes (a .pt with model, ema, opt) or a plain state dict, also as safetensors. No code in
    it is executed: a file that holds anything but tensors, plain containers and the options of a command is refused by
    name. Of a transformer of diffusers (DiT, PixArt, SD3, Flux) it is the .safetensors, with its config.json next to it. Of
    other models sizes and QK-norm are read from the tensors; SiT's time (0 is noise) is folded into the weights.

    Then `selftrans sample OUT` and `selftrans train RECIPE --teacher OUT` take the run, and the command that is printed
    trains it further: with AdamW's state if the file has it, with any overrides of yours, by the flow loss alone (a stage-1
    file of Self-Transcendence: with its head).
    """

    file: Positional[Path]
    """published checkpoint, .pt or .safetensors"""
    out: Path
    """run directory to make; nothing else may be in it"""
    name: str | None = None
    """published size that is expected, such as SiT-XL/2; None: any"""
    convention: str | None = None
    """sit (t = 0 is noise), repa (t = 0 is data; also Self-Transcendence), dit (predicts noise of DDPM) or diffusers; None:
    from the file, or guessed and printed"""
    heads: int | None = None
    """attention heads; None: from q_norm, or as published for this width"""
    step: int | None = None
    """steps it was trained for; None: from the file"""
    path: Literal["linear", "cosine"] | None = None
    """path of the run, for a file that serves both (DiT predicts noise); None: linear, or as the file says"""
    autoencoder: str | None = None
    """what decodes its latents; None: what a file of `selftrans export` names, else stabilityai/sd-vae-ft-mse for 4
    channels, pixel for 1 or 3"""
    keep_heads: bool = False
    """keep projectors that the run cannot use, in projectors.safetensors"""

    def run(self) -> None:
        from selftrans.interop.importing import import_run

        import_run(**self.options())


@dataclass
class ImportVae(Command):
    """A variational autoencoder of latent diffusion's code (VA-VAE and others) to a folder for `prepare --autoencoder`.

    FILE is its checkpoint (.pt, .ckpt or .safetensors). No code in it is executed. OUT is a folder that diffusers loads, too.
    """

    file: Positional[Path]
    """checkpoint of the autoencoder"""
    out: Path
    """folder to make"""
    latent_stats: Path | None = None
    """mean and std of each channel of its latents: VA-VAE's latents_stats.pt, safetensors or json; they become the latents'
    shift and scale. None: latents are not scaled"""

    def run(self) -> None:
        from selftrans.interop.published_vae import import_vae

        print(import_vae(self.file, self.out, latent_stats=self.latent_stats))


@dataclass
class Export(Command):
    """A run's weights as one safetensors file without heads, for selftrans or in a published layout.

    Writes OUT/model.safetensors and OUT/config.json. In a published layout the file holds what `SiT(**arguments)` (`DiT`,
    `LightningDiT`, `MMDiT`) of that repository loads, with `arguments` from config.json (REPA's with z_dims=[], so without
    projectors), and `selftrans import` reads it back. The layout diffusers, of the models diffusers-*, is a folder that
    `from_pretrained` of their class loads. The other models do not have it: DiT of diffusers has other timestep frequencies and
    no QK-norm, so it would be another network. The layout pipeline, of every model, is a folder of several files that
    `selftrans.interop.SiTPipeline.from_pretrained` loads, with its VAE, and that every command accepts in place of a run.
    """

    run_or_file: RunOrFile
    out: Path
    """directory for model.safetensors and config.json"""
    weights: Weights = "ema"
    layout: str = "selftrans"
    """selftrans: accepted in place of a run by every command; pipeline: so, too, and by diffusers; or a published layout: of
    SiT sit or repa, of DiT dit, of LightningDiT lightningdit, of MMDiT repa, of diffusers-* diffusers"""
    adapters: bool = False
    """of a run with --lora.rank: its adapters alone, with --layout peft (the default then) or diffusers; otherwise they are
    merged into the weights"""
    stage: Stage = None
    trust: Trust = ()

    def run(self) -> None:
        from selftrans.interop.adapter_files import export_adapters
        from selftrans.interop.exporting import OURS, export_run

        if self.adapters:
            layout = "peft" if self.layout == OURS else self.layout
            options = self.options("run_or_file", "adapters") | {"layout": layout}
            made = export_adapters(self.run_or_file, **options)
            print(f"adapters of the {self.weights} weights, layout {layout} -> {escaped(made)}")
            return
        made = export_run(self.run_or_file, **self.options("run_or_file", "adapters"))
        print(f"{self.weights} weights, layout {self.layout} -> {escaped(made)}")


@dataclass
class Push(Command):
    """A run to a repository of the Hugging Face hub, with a model card, or with --dry-run to a folder.

    Writes what `export --layout pipeline` writes, with README.md (the card: numbers with what they depend on, samples,
    settings, total compute), samples.png and selftrans.json. `selftrans sample hf://REPOSITORY` and
    SiTPipeline.from_pretrained then take it. Log in before, by `hf auth login`. The same command again continues an
    interrupted upload.

    Numbers are those of `selftrans evaluate`, samples those of `selftrans sample` or of the last preview; those of other
    weights are left out.
    """

    REPEATED = CONTINUES

    run_or_file: RunOrFile
    repository: Annotated[
        str, Positional, tyro.conf.arg(metavar="REPOSITORY", help="owner/name; it is created if needed")
    ]
    license: str
    """license of the weights, as the hub names it: apache-2.0, mit, cc-by-nc-4.0, other ..."""
    private: bool = False
    """the repository must be private"""
    samples: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """folder of `selftrans sample`, whose first pictures are shown; None: the preview of the last step"""
    evaluations: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE [FILE ...]")] = ()
    """reports of `selftrans evaluate`; none: evaluate.json in the run"""
    dry_run: bool = False
    """write the folder, and nothing to the hub"""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """where the folder is written; None: a temporary one, with --dry-run the repository's name in the current folder"""
    force: bool = False
    """write into a repository that holds other files; they are kept, except those of the same names"""
    weights: Weights = "ema"
    stage: Stage = None
    trust: Trust = ()

    def run(self) -> None:
        from selftrans.interop.pushing import Chosen, push, write_folder

        chosen = Chosen(self.license, self.samples, self.evaluations)
        options: dict[str, Any] = {"weights": self.weights, "stage": self.stage}
        if self.dry_run:
            from selftrans.messages import plural

            out = self.out or Path(self.repository.rpartition("/")[2] or "push")
            files = write_folder(self.run_or_file, self.repository, out, chosen, **options)
            print(f"{plural(len(files), 'file')} of {self.repository} -> {escaped(out)}; nothing was uploaded")
            return
        options |= {"private": self.private, "force": self.force, "out": self.out}
        print(f"pushed: {push(self.run_or_file, self.repository, chosen, **options)}")
