"""What a family of backbones is: a record of its settings, how it is built, and its published checkpoints.

Nothing outside this package names a family, one of its settings or one of its layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from selftrans.messages import printable
from selftrans.sections import Section
from selftrans.types import Backbone, Conditions

#: end of an error message for a model that does not read text
LABELS_ONLY = (
    "conditioned on labels or on nothing; the data have text: choose a model that reads it, such as --model.name MMDiT-S/2 "
    "(recipe imagefolder_t2i)"
)
Named = dict[str, Tensor]  #: tensors by name, in the order of the parameters


@dataclass(frozen=True)
class ModelConfig(Section):
    """Settings of a model, `--model.*`. A family's own class adds its sizes; `check` refuses those that cannot work."""

    key = "model"

    name: str = ""
    """a name of the family: a published size, or that of the family itself"""
    early_block: int | None = field(default=None, kw_only=True)
    """block after which a second output reads a velocity, for methods that train one and for --early-guidance; None: none"""

    @property
    def predicts(self) -> Literal["velocity", "noise"]:
        """What the network predicts: `Backbone.predicts` of the model."""
        return "velocity"

    def blocks(self) -> int:
        """Number of blocks: a weights file with fewer tensors cannot be of this model, and none is built for it."""
        return 0


class PublishedFile(NamedTuple):
    """What a checkpoint file of another code holds, under its own names but for the wrappers' parts."""

    path: Path
    weights: dict[str, Named]  #: "raw", "ema" or both -> the model with its heads, in the order of its parameters
    optimizer: Any  #: AdamW's state_dict(), or None
    args: dict[str, Any]  #: the options of the command that trained it, if kept
    steps: int | None
    layout: str | None  #: a key of `ModelSpec.layouts`, where our own export says so
    unused: list[str]  #: its top-level entries that nothing here reads, safe to print
    autoencoder: str | None = None  #: what decodes its latents, where our own export says so

    @property
    def named(self) -> Named:
        """The trained weights, or else their average."""
        return self.weights.get("raw") or self.weights["ema"]

    def where(self, kind: str) -> str:
        """How messages call its weights of this kind."""
        return f"{self.path} ({kind} weights)" if len(self.weights) > 1 else str(self.path)


class Published(NamedTuple):
    """A published file as a model of a family: how to build the model and load the weights."""

    name: str  #: the published size, or how messages call it
    sizes: str  #: for messages
    config: ModelConfig
    shape: tuple[int, ...]  #: (C, *S) of a latent
    conditions: Conditions
    convention: str  #: whose time and sign the weights have
    reason: str  #: what shows it
    source: dict[str, Any]  #: what else the import depends on, for the record
    translate: Callable[[Named, bool], Named]  #: (tensors of the file, whether they are squares) -> our backbone's
    path: str | None = None  #: probability path (`flow.PATHS`), where the file says it
    recipe: str | None = None  #: the recipe that such a model was published with, if there is one
    is_head: Callable[[str], bool] = lambda name: False  #: whether a tensor belongs to a projection head, by its name
    is_fixed: Callable[[str], bool] = lambda name: False  #: whether it is a constant of the model, which is not stored
    is_buffer: Callable[[str], bool] = lambda name: False  #: whether a constant is no parameter for their optimiser
    #: rows of a layer that predicts a token's cells, in `Backbone.patchify`'s order
    cells: Callable[[Tensor], Tensor] = lambda layer: layer


class Layout(NamedTuple):
    """How another code stores a model of this family."""

    time: str  #: what its time and velocity mean
    tensors: Callable[[Any], Named]  #: of a backbone, under the names of that code
    arguments: Callable[[Any, Any], dict[str, Any]]  #: (backbone, config) -> those of its class. ValueError: cannot
    #: name of the weights file, where that code reads a folder; config.json then holds the arguments and nothing else
    folder: str | None = None


@dataclass(frozen=True)
class ModelSpec:
    """A family of backbones. Built-in ones are listed in `registry.MODELS`; other packages add theirs by an entry point."""

    name: str
    Config: type[ModelConfig]
    build: Callable[[Any, tuple[int, ...], Conditions], Backbone]  #: (config, shape (C, *S), conditions), new weights
    names: tuple[str, ...] = ()  #: values of `model.name` that belong to it; empty: its own name
    layouts: Mapping[str, Layout] = field(default_factory=dict)  #: published layouts that `export` writes, by name
    #: reads a published file: (file, attention heads if given, convention if given). None: it is of another family
    reader: Callable[[PublishedFile, int | None, str | None], Published | None] = lambda file, heads, convention: None
    conventions: tuple[str, ...] = ()  #: of time and sign, that `import --convention` may name for its files


def check_shapes(where: str, named: Named, expected: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError unless `named` has exactly the expected names and shapes; it lists a few of each kind of fault."""
    known = [name for name in named if name in expected]
    shapes = [
        f"{n} {tuple(named[n].shape)} instead of {expected[n]}" for n in known if tuple(named[n].shape) != expected[n]
    ]
    wrong = {
        "unknown": [name for name in named if name not in expected],
        "missing": [name for name in expected if name not in named],
        "misshapen": shapes,
    }
    if any(wrong.values()):
        faults = "; ".join(f"{what}: {count_and_names(names)}" for what, names in wrong.items() if names)
        raise ValueError(f"{where} is not as expected: {faults}")


def count_and_names(names: Iterable[str]) -> str:
    """`4 tensors (a, b, c, ...)`, safe to print."""
    every = list(names)
    return f"{len(every)} ({', '.join(map(printable, every[:3]))}{', ...' if len(every) > 3 else ''})"
