"""The types that flow through selftrans, and the shape legend used in every file.

Shape legend: N batch, T tokens, D width, (C, *S) latent with one to three spatial dimensions S, k block (1-based), M moments
channels, L text tokens of E channels. States of the data, in order: pixels => moments => latents (`Batch`) => `Draw` =>
`Output` => loss. t = 0 is data and t = 1 is noise everywhere (see `flow.py`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Self, TypeAlias

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from selftrans.messages import first_line, plural
from selftrans.plain_json import Count, matching, within

#: A condition: a label tensor (N,), or named tensors that all start with N (text tokens, mask, pooled vector).
#: Objective, guidance, trainer and sampler never look inside; they use the five functions at the end of this file.
Cond: TypeAlias = Tensor | dict[str, Tensor]
#: names in a text condition: tokens (N, L, E) of the last hidden state; mask (N, L) bool, true where there is no padding
TEXT, MASK = "text", "mask"


@dataclass(frozen=True)
class Conditions:
    """What the samples of a data set are conditioned on. The data's manifest records it; each model defines its null."""

    kind: Literal["none", "labels", "text"]
    num_classes: Count = 0  #: of kind labels: labels are 0 .. num_classes - 1
    tokens: Annotated[int, within(0, 1 << 12)] = 0  #: L, of kind text: tokens of a caption, padding included
    width: Annotated[int, within(0, 1 << 16)] = 0  #: E, of kind text: channels of a text token
    encoder: str = field(default="", compare=False)  #: of kind text: hub id or folder of the text encoder
    #: of kind text: of the encoder's weights and tokeniser, data of another encoder differ in it
    sha256: Annotated[str, matching("([0-9a-f]{64})?", "a sha256 in hexadecimal, or empty")] = ""

    def example(self) -> Cond:
        """A condition of one sample, for counting operations; with kind none every label is 0."""
        if self.kind == "text":
            text, mask = torch.zeros(1, self.tokens, self.width), torch.ones(1, self.tokens, dtype=torch.bool)
            return {TEXT: text, MASK: mask}
        return torch.zeros(1, dtype=torch.long)

    def fits(self, other: Conditions) -> bool:
        """Whether both are equal, or one does not know its text encoder: the file of an imported model has no sha256 of it."""
        unknown = not (self.sha256 and other.sha256)
        return self == (replace(other, sha256=self.sha256) if unknown else other)

    def check_labels(self, cond: Cond, n: int, *, null: bool = False, on_device: bool = True) -> None:
        """ValueError unless labels (N,) are integers within the classes, one for each of `n` samples.

        Of a text condition only the type is checked. The host never waits for a device: it reads values on the CPU only. On a
        GPU a wrong label ends the process by an assertion on the device, which takes a few kernels (`on_device`). `null`: the
        null label (num_classes) is allowed, too.
        """
        if not isinstance(cond, Tensor | dict):
            none = "; without classes every label is 0: torch.zeros(N, dtype=torch.long)" if self.kind == "none" else ""
            raise ValueError(
                f"a condition is a tensor of labels (N,), or named tensors of text, not {type(cond).__name__}{none}"
            )
        if self.kind == "text" and isinstance(cond, Tensor):
            raise ValueError(
                f"the model is conditioned on {self}, not on labels; give named tensors of captions, such as "
                '{"text": tokens (N, L, E), "mask": (N, L)}'
            )
        if self.kind != "labels" or not isinstance(cond, Tensor):
            return
        if cond.dtype not in (torch.int64, torch.int32) or tuple(cond.shape) != (n,):
            found = f"{str(cond.dtype).removeprefix('torch.')} of shape {tuple(cond.shape)}"
            raise ValueError(f"labels must be whole numbers (torch.long) of shape ({n},), one per sample, not {found}")
        last = self.num_classes - (0 if null else 1)
        if n == 0 or type(cond) is not Tensor or torch.compiler.is_compiling():
            return
        expected = f"the model has {plural(self.num_classes, 'class')}, so labels are 0 to {self.num_classes - 1}"
        if cond.device.type == "cuda" and on_device:
            torch._assert_async(((cond >= 0) & (cond <= last)).all(), f"a label is out of range: {expected}")
        elif cond.device.type == "cpu":
            values = cond.detach().numpy()  # torch would count it as a read by the host
            if len(outside := values[(values < 0) | (values > last)]):
                wrong = int(outside[0])
                why = " (the null label, which the objective sets by itself)" if wrong == self.num_classes else ""
                raise ValueError(f"label {wrong}{why} is out of range: {expected}")

    def __str__(self) -> str:
        """As messages name it."""
        text = f"text of {self.tokens}x{self.width} by {self.encoder or 'an unnamed encoder'}"
        return {"none": "no condition", "labels": plural(self.num_classes, "class"), "text": text}[self.kind]


class Batch(NamedTuple):
    """What a training step is given."""

    z0: Tensor  #: (N, C, *S) latents, scaled to about unit variance
    cond: Cond  #: true condition of each sample
    features: Tensor | None = None  #: (N, T, D) of an external encoder, stored with the data, if a guidance reads them


class Draw(NamedTuple):
    """Everything random in one step, drawn once and shared by the flow loss and every guidance."""

    z0: Tensor  #: (N, C, *S) data
    noise: Tensor  #: (N, C, *S) standard normal
    t: Tensor  #: (N,) in [0, 1]; 0 is data, 1 is noise
    zt: Tensor  #: (N, C, *S) point on the path
    v: Tensor  #: (N, C, *S) velocity d zt / dt, the target of the flow loss
    cond: Cond  #: true condition, for the teacher
    null: Cond  #: null condition of the same shape, for the teacher's other half
    dropped: Cond  #: condition with some samples replaced by the null one, for the student
    even: bool = False  #: t is evenly spread (`flow.Times.even`), so a range holds a bounded number of samples
    features: Tensor | None = None  #: as in the batch
    step: int | Tensor = 0  #: number of the training step, from 0; in a captured step a 0-d tensor on the device
    #: of a range (a, b) of t: the share of such times that lie in it, on average; None: not known, the caller gave t
    share: Callable[[tuple[float, float]], float] | None = None


class Output(NamedTuple):
    """What a backbone returns."""

    v: Tensor | None  #: (N, C, *S) velocity; None when stopped early
    feats: dict[int, Tensor]  #: 1-based block -> (N, T, D) tokens of the noisy latent after that block (no text tokens)


class Backbone(nn.Module):
    """A diffusion transformer, as the methods, the trainer and the samplers see it. Subclass it; see docs/extending.md.

    A subclass sets the attributes and implements `forward` and `patchify`, and `null` for text; the rest has working defaults.
    """

    depth: int  #: number of blocks
    width: int  #: D, channels of a token
    shape: tuple[int, ...]  #: (C, *S) of a latent
    grid: tuple[int, ...]  #: tokens along each spatial dimension; T is their product
    conditions: Conditions  #: what it is conditioned on
    null_set: bool = True  #: whether `null` is known; False: not before `use_null`
    #: activation checkpointing, in models that call their blocks by `run_block`: of all blocks, or of these (1-based)
    recompute: bool | frozenset[int] = False
    #: whether blocks may draw random numbers, which a block that is computed again must repeat
    random_blocks: bool = True
    predicts: Literal["velocity", "noise"] = "velocity"  #: by the network, before `forward` turns it into a velocity
    early_block: int = 0  #: the block whose tokens the second output reads (1-based); 0: there is none, see `add_early`

    if TYPE_CHECKING:  # nn.Module declares that a call returns Any

        def __call__(
            self, x: Tensor, t: Tensor, cond: Cond, *, taps: tuple[int, ...] = (), stop: bool = False
        ) -> Output: ...

    def forward(self, x: Tensor, t: Tensor, cond: Cond, *, taps: tuple[int, ...] = (), stop: bool = False) -> Output:
        """Velocity at x (N, C, *S), t (N,) under `cond`, with the features after each block of `taps` (1-based).

        With `stop=True` computation ends when the last tap is served, and `Output.v` is None.
        """
        raise NotImplementedError

    def null(self, cond: Cond) -> Cond:
        """The unconditional condition, in the shape of `cond`. Default: the label after the last class; none for text."""
        if self.conditions.kind == "text":
            raise NotImplementedError
        return map_cond(lambda labels: torch.full_like(labels, self.conditions.num_classes), cond)

    def use_null(self, cond: Cond) -> None:
        """Take the null condition from one row of data: the empty caption. Default: nothing, the model has its own.

        Called once, before training; a model that needs it keeps it as a buffer, so that its checkpoints hold it.
        """

    def patchify(self, x: Tensor) -> Tensor:
        """Latents (N, C, *S) cut into the model's tokens: (N, T, C * cells), cells the positions that one token covers."""
        raise NotImplementedError

    def use_path(self, path: str) -> None:
        """Set the path (a name in `flow.PATHS`) whose velocity `forward` returns. Default: ignored, since weights learn it."""

    @property
    def early(self) -> Any:
        """The second output: tokens (N, T, D) after `early_block` to a velocity's cells (N, T, C * cells); None without one."""
        return self._modules.get("early_output")  # an attribute of the class would hide the module

    def add_early(self, block: int) -> None:
        """Add a second output, which reads a velocity from the tokens after `block`: LayerNorm, then a linear layer of zeros.

        It is a part of the model, so that the average and the weights files have it. ValueError unless `block` is one of the
        blocks before the last.
        """
        if not 1 <= block < self.depth:
            raise ValueError(f"model.early_block {block} must be a block before the last of {self.depth}")
        linear = nn.Linear(self.width, math.prod(self.shape) // self.tokens)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        self.early_output = nn.Sequential(nn.LayerNorm(self.width, elementwise_affine=False, eps=1e-6), linear)
        self.early_block = block

    def remove_early(self) -> None:
        """Remove the second output, if there is one."""
        self._modules.pop("early_output", None)
        self.early_block = 0

    def early_cells(self, tokens: Tensor) -> Tensor:
        """The second output of tokens (N, T, D): (N, T, C * cells), as `patchify` cuts a velocity."""
        return self.early_output(tokens)

    def from_tokens(self, cells: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Inverse of a `patchify` that only reorders numbers: (N, T, C * cells) -> (N, *shape)."""
        # made on a CUDA device, since a copy from the host waits for it; other devices may have no float64
        device = cells.device if cells.is_cuda else "cpu"
        positions = torch.arange(math.prod(shape), dtype=torch.float64, device=device).view(1, *shape)
        # position in the latent of each token's numbers
        order = self.patchify(positions).flatten().long().to(cells.device)
        latent = torch.empty_like(cells.flatten(start_dim=1))
        latent[:, order] = cells.flatten(start_dim=1)
        return latent.view(-1, *shape)

    @property
    def tokens(self) -> int:
        """T, tokens of a latent."""
        return math.prod(self.grid)

    def grid_of(self, sides: tuple[int, ...]) -> tuple[int, ...]:
        """Tokens along each dimension of a latent (C, *sides), which may have another size than the model's own."""
        cells = (side // n for side, n in zip(self.shape[1:], self.grid, strict=True))
        return tuple(side // cell for side, cell in zip(sides, cells, strict=True))

    def repeated(self) -> list[nn.Module]:
        """The blocks in order: what is compiled and sharded one by one. Default: none, the model is treated as one part."""
        return []

    def compiled_alone(self) -> list[nn.Module]:
        """Other parts that are compiled, each by itself. Default: none."""
        return []

    def sharded(self) -> list[nn.Module]:
        """The parts whose weights FSDP2 gathers one by one. Default: the blocks."""
        return self.repeated()

    def run_block(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        """The output of one block; with `recompute`, in training, its activations are computed again in backward."""
        if not self.training or not self.recompute or not self._recomputes(block):
            return block(*inputs)
        return torch.utils.checkpoint.checkpoint(
            block, *inputs, use_reentrant=False, preserve_rng_state=self.random_blocks
        )

    def _recomputes(self, block: nn.Module) -> bool:
        if isinstance(self.recompute, bool):
            return self.recompute
        return any(each is block for k, each in enumerate(self.repeated(), start=1) if k in self.recompute)

    def truncate(self, block: int) -> None:
        """Delete what comes after `block` (1-based), in place; afterwards only calls with `stop=True` are served.

        Default: nothing is deleted; a call with `stop=True` computes no further anyway.
        """

    def truncated(self, block: int) -> Self:
        """A copy of blocks 1 .. `block`; this model stays as it is. No memory is taken for the later blocks."""
        tensors: dict[int, Any] = {id(tensor): tensor for tensor in (*self.parameters(), *self.buffers())}
        shallow = copy.deepcopy(self, tensors)  # modules of its own on this model's tensors
        shallow.truncate(block)
        shallow.remove_early()
        return copy.deepcopy(shallow)


@contextmanager
def eval_mode(backbone: Any) -> Iterator[None]:
    """Eval mode in the block; afterwards each submodule returns to its previous mode. For other callables nothing is done."""
    modes = {module: module.training for module in backbone.modules()} if isinstance(backbone, nn.Module) else {}
    try:
        if modes:
            backbone.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def check_takes(backbone: Backbone, shape: tuple[int, ...]) -> None:
    """ValueError unless a backbone computes velocities of latents (C, *S) of this shape, by trying it on one."""
    device = next(backbone.parameters()).device
    x, t = torch.zeros(1, *shape, device=device), torch.zeros(1, device=device)
    cond = map_cond(lambda c: c.to(device), backbone.conditions.example())
    try:
        with eval_mode(backbone), torch.autocast(device.type, dtype=torch.bfloat16):
            v = backbone(x, t, cond).v
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"the model does not take latents of {tuple(shape)}: {first_line(error, 300)}") from error
    if v is None or v.shape != x.shape:
        raise ValueError(f"the model takes latents of {tuple(backbone.shape)} only, not of {tuple(shape)}")


def check_backbone(model: Any, role: str) -> None:
    """ValueError unless a model has the attributes of a `Backbone`. `role`: its name in the message, such as "the student"."""
    try:
        _ = model.depth, model.width, model.shape, model.grid, model.conditions
    except AttributeError as error:
        wraps = isinstance(model, nn.Module) and any(isinstance(part, Backbone) for part in model.children())
        remedy = (
            "give the model that it wraps, such as its .module"
            if wraps
            else "subclass selftrans.Backbone and set its attributes, or wrap a module in selftrans.HookedBackbone"
        )
        raise ValueError(f"{role} is no complete backbone: {error}; {remedy}") from error


def check_latents(z0: Tensor, shape: tuple[int, ...]) -> None:
    """ValueError unless latents are (N, C, *S), at least one, of floats, with the channels and dimensions of `shape`."""
    if not isinstance(z0, Tensor) or not z0.is_floating_point():
        found = str(z0.dtype).removeprefix("torch.") if isinstance(z0, Tensor) else type(z0).__name__
        raise ValueError(f"latents must be a tensor of floats, not {found}; scale pixels to about unit variance")
    if z0.dim() != len(shape) + 1 or z0.shape[1] != shape[0] or not z0.shape[0]:
        sides = ", ".join(map(str, shape))
        raise ValueError(f"latents must be (N, {sides}) with N at least 1 (sides may differ), not {tuple(z0.shape)}")


def map_cond(fn: Callable[..., Tensor], *conds: Cond) -> Cond:
    """Apply `fn` to each tensor of one or more conditions of the same structure."""
    first = conds[0]
    if isinstance(first, dict):
        return {name: fn(*(c[name] for c in conds)) for name in first}  # type: ignore[index]
    return fn(*conds)


def tensors_of(cond: Cond) -> list[Tensor]:
    """The tensors of a condition."""
    return list(cond.values()) if isinstance(cond, dict) else [cond]


def cat_cond(*conds: Cond) -> Cond:
    """Concatenate conditions along the batch."""
    return map_cond(lambda *xs: torch.cat(xs, dim=0), *conds)


def take_cond(cond: Cond, rows: Tensor) -> Cond:
    """Rows (M,) of a condition."""
    return map_cond(lambda x: x[rows], cond)


def where_cond(mask: Tensor, yes: Cond, no: Cond) -> Cond:
    """`yes` where mask (N,) is true, `no` elsewhere."""
    return map_cond(lambda a, b: torch.where(mask.view(-1, *[1] * (a.dim() - 1)), a, b), yes, no)
