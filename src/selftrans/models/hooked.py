"""A backbone made of any module with a list of blocks: their outputs are read while the module runs its own forward.

The blocks are read around `nn.Module.__call__`, by a subclass that each of them is given at construction, and not by
`register_forward_hook`: the exception that ends a pass early would, in a forward hook, skip the hooks that FSDP2 adds later,
which free the block's gathered weights; a compiled block has its forward hooks within what is compiled; and activations can
be recomputed from there. What was read lives in an object that a deep copy of the model copies too, so a copy reads its own
blocks.
Shape legend: N batch, T tokens, D width, (C, *S) latent.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from selftrans.models.layers import patchify
from selftrans.models.text_null import TextNull
from selftrans.types import Backbone, Cond, Conditions, Output

Blocks = str | Callable[[Any], Sequence[nn.Module]]
Call = Callable[[Any, Tensor, Tensor, Cond], Tensor]


class _Stopped(BaseException):
    """The last feature was read. A `BaseException`, since the module might catch an `Exception`."""


class _Reading:
    """A forward pass in progress: the features to be read, and those read so far. One object for all blocks of a model."""

    def __init__(self, tokens: Callable[[Any], Any]) -> None:
        self.tokens = tokens
        self.active = False

    def begin(
        self, taps: tuple[int, ...], stop: bool, recompute: bool | frozenset[int], shape: tuple[int, int, int]
    ) -> None:
        self.taps, self.stop, self.recompute, self.shape = frozenset(taps), stop, recompute, shape
        self.grad, self.active = torch.is_grad_enabled(), True
        self.called: set[int] = set()
        self.feats: dict[int, Tensor] = {}
        self.versions: dict[int, int] = {}

    def end(self) -> None:
        """Drop the features, so that their memory can be freed."""
        self.active, self.feats = False, {}

    def run(self, k: int, block: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of block k. Raises `_Stopped` when no more is wanted."""
        if k in self.called:
            raise ValueError(f"block {k} is called several times in one forward pass, so it has no one output to read")
        self.called.add(k)
        if self.recompute is True or (self.recompute and k in self.recompute):
            output = torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=False, **kwargs)
        else:
            output = block(*args, **kwargs)
        if k in self.taps:
            self._read(k, output)
            if self.stop and len(self.feats) == len(self.taps):
                raise _Stopped
        return output

    def _read(self, k: int, output: Any) -> None:
        found = self.tokens(output)
        if not isinstance(found, Tensor):
            raise ValueError(
                f"the output of block {k} is of type {type(found).__name__}, not a tensor; give tokens=, which picks "
                "the tokens of the latent"
            )
        if tuple(found.shape) != self.shape:
            raise ValueError(
                f"the tokens of block {k} are of shape {tuple(found.shape)}; expected (N, T, D) = {self.shape}; give tokens=, "
                "which leaves out those that are not of the latent (class, text, registers), or correct grid and width"
            )
        if self.grad and not torch.is_grad_enabled():
            raise ValueError(
                f"block {k} runs without gradients inside a forward pass with gradients (reentrant checkpointing?), so its "
                "features could not be trained; switch that off and set recompute = True on this HookedBackbone "
                "(--train.recompute)"
            )
        self.feats[k] = found
        self.versions[k] = 0 if found.is_inference() else found._version

    def features(self) -> dict[int, Tensor]:
        """The features by block. ValueError where the module changed one in place afterwards, or did not run its block."""
        missing = sorted(self.taps - self.feats.keys())
        if missing:
            raise ValueError(f"the module did not call block {missing[0]}; give blocks= that each forward pass calls")
        for k, found in self.feats.items():
            if not found.is_inference() and found._version != self.versions[k]:
                raise ValueError(
                    f"the output of block {k} is changed in place by what follows it; give tokens=, which returns a copy"
                )
        return self.feats


@functools.cache
def _read_class(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a block's class whose calls go through `_Reading.run`."""
    plain: Callable[..., Any] = kind.__call__
    # where the whole model is compiled, the reading would be compiled again for each block; the blocks are compiled in any case
    run = torch.compiler.disable(_Reading.run, recursive=False)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        reading, k, _ = self._read_by
        if not reading.active:  # the module is used by itself, or its blocks are computed again in a backward pass
            return plain(self, *args, **kwargs)
        return run(reading, k, functools.partial(plain, self), args, kwargs)

    call = torch.compiler.disable(call, recursive=False)
    return type(f"Read{kind.__name__}", (kind,), {"__call__": call, "__module__": kind.__module__})


class _Deleted(nn.Module):
    """Stands in the place of a deleted block, so that the other blocks keep their names and positions."""

    def forward(self, *_: Any, **__: Any) -> Any:
        raise ValueError(
            "a truncated model runs a deleted block first; give blocks= in the order in which they are called"
        )


class HookedBackbone(TextNull, Backbone):
    """Any module as a backbone.

    Args:
        net: the module. Its blocks get a subclass of their class; names of parameters stay, behind `net.`.
        blocks: the blocks in the order in which they are called: the dotted path of a list, or a function of `net`.
        call: `(net, x (N, C, *S), t (N,), cond) -> velocity (N, C, *S)` in our time and sign: t = 0 is data.
        shape, grid, width, conditions: as `Backbone` has them: (C, *S), tokens per dimension, D, what `cond` is.
        tokens: output of a block -> its tokens of the latent (N, T, D), in the order of `grid`. Default: the output itself.
        null: `cond` -> the unconditional one. Default: the label after the last class; of text the empty caption (`TextNull`).
        patchify: latents -> (N, T, C * cells). Default: channel, then positions, inside a token.
        shard_blocks: False where the module uses parameters of a block outside its call (diffusers' DiT embeds the time for
            its last layer by its first block). FSDP2 then gathers the model as one part, as where blocks share parameters.
    The functions must not hold `net` themselves: a copy of this model calls them with its own.
    Raises ValueError for blocks that are not found or cannot be read.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        blocks: Blocks,
        call: Call,
        shape: tuple[int, ...],
        grid: tuple[int, ...],
        width: int,
        conditions: Conditions,
        tokens: Callable[[Any], Any] = lambda output: output,
        null: Callable[[Cond], Cond] | None = None,
        patchify: Callable[[Tensor], Tensor] | None = None,
        shard_blocks: bool = True,
    ) -> None:
        super().__init__()
        _check_plain(net)
        if len(grid) != len(shape) - 1 or any(side % n for side, n in zip(shape[1:], grid, strict=True)):
            raise ValueError(f"a latent {shape} does not divide into {grid} tokens; correct shape or grid")
        self.shape, self.grid, self.width, self.conditions = tuple(shape), tuple(grid), width, conditions
        self.net, self._blocks, self._call, self._null, self._patchify = net, blocks, call, null, patchify
        self._reading, self._shard_blocks, self._kept = _Reading(tokens), shard_blocks, 0
        if conditions.kind == "text" and null is None:
            self.keep_null(conditions)
        found = self._found()
        _check_blocks(found)
        self.depth = self._kept = len(found)
        for block in found:
            copied = hasattr(block, "_read_by")  # of a module that a backbone reads: its class reads already
            block.__class__ = _read_class(type(block).__base__ if copied else type(block))
        self._claim(found)

    def _claim(self, blocks: Sequence[nn.Module]) -> None:
        """Let this model read the blocks. A copy of one keeps the reference to the original, by which it is known as a copy."""
        for k, block in enumerate(blocks, start=1):
            block._read_by = (self._reading, k, weakref.ref(block))  # type: ignore[assignment]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy of the whole model: its blocks are its own, unlike those of a copy of `net` alone."""
        super().__setstate__(state)
        self._claim(self._found())

    def forward(self, x: Tensor, t: Tensor, cond: Cond, *, taps: tuple[int, ...] = (), stop: bool = False) -> Output:
        """As `Backbone`. ValueError where a block or `call` returns something else than expected."""
        assert all(1 <= k <= self._kept for k in taps)
        assert stop or self._kept == self.depth, "a truncated model has no velocity; call it with stop=True"
        if stop and not taps:
            return Output(None, {})
        reading = self._reading
        reading.begin(taps, stop, self.training and self.recompute, (x.shape[0], self.tokens, self.width))
        try:
            v = self._call(self.net, x, t, cond)
            feats = reading.features()
        except _Stopped:
            return Output(None, reading.features())
        finally:
            reading.end()
        if stop:
            return Output(None, feats)
        # an objective with a loss of its own may take other channels, and refuses them otherwise
        if not isinstance(v, Tensor) or (v.shape[0], *v.shape[2:]) != (x.shape[0], *x.shape[2:]):
            what = tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
            raise ValueError(f"call= returned {what}; expected a velocity of shape {tuple(x.shape)}")
        return Output(v, feats)

    def null(self, cond: Cond) -> Cond:
        if self._null is not None:
            return self._null(cond)
        return super().null(cond) if self.conditions.kind == "text" else Backbone.null(self, cond)

    def use_null(self, cond: Cond) -> None:
        if self._null is None:
            super().use_null(cond)

    def patchify(self, x: Tensor) -> Tensor:
        if self._patchify is not None:
            return self._patchify(x)
        return patchify(x, tuple(side // n for side, n in zip(self.shape[1:], self.grid, strict=True)))

    def repeated(self) -> list[nn.Module]:
        return self._found()

    def sharded(self) -> list[nn.Module]:
        found = self._found()
        return found if self._shard_blocks and not _shared(found) else []

    def truncate(self, block: int) -> None:
        """As `Backbone`. What follows the blocks stays, as it is not known. ValueError where blocks share parameters."""
        found = self._found()
        if shared := _shared(found):
            raise ValueError(f"{shared}, so a truncated copy cannot be made; give the module parameters of their own")
        gone = set(found[block:])
        for parent in list(self.net.modules()):
            for name, child in parent.named_children():
                if child in gone:
                    setattr(parent, name, _Deleted())
        self._kept = min(self._kept, block)

    def _found(self) -> list[nn.Module]:
        """The blocks that were not deleted, in order."""
        if not isinstance(self._blocks, str):
            found: Any = self._blocks(self.net)
        else:
            try:
                found = self.net.get_submodule(self._blocks)
            except AttributeError as error:
                names = ", ".join(
                    n for n, m in self.net.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential)
                )
                raise ValueError(
                    f"{type(self.net).__name__} has no blocks '{self._blocks}'; it has the lists {names or '(none)'}"
                ) from error
        if not isinstance(found, list | tuple | nn.ModuleList | nn.Sequential):
            raise ValueError(f"blocks= leads to a {type(found).__name__}; expected a list of modules")
        return [block for block in found if not isinstance(block, _Deleted)]


def _check_plain(net: nn.Module) -> None:
    """ValueError where a module is compiled or distributed already: then calls of its blocks cannot be seen."""
    for name, module in net.named_modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        wrapper = next(iter(kinds & {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}), None)
        if "OptimizedModule" in kinds or module._compiled_call_impl is not None:
            wrapper = "torch.compile"
        if wrapper:
            raise ValueError(
                f"the module {name or type(net).__name__} is already in {wrapper}; give the plain module, and apply "
                f"{wrapper} to the Objective (commands do this themselves)"
            )


def _check_blocks(blocks: list[Any]) -> None:
    """ValueError unless there are blocks, each one once, and each can be read."""
    if not blocks:
        raise ValueError("the list of blocks is empty; give blocks= that names the transformer blocks")
    if len(set(map(id, blocks))) < len(blocks):
        raise ValueError(
            "a block is in the list of blocks twice: it is called several times, and has no one output to read"
        )
    for k, block in enumerate(blocks, start=1):
        if isinstance(block, torch.jit.ScriptModule):
            raise ValueError(f"block {k} is a TorchScript module, which cannot be read; give the module it was made of")
        if hasattr(block, "_read_by") and block._read_by[2]() is block:
            raise ValueError(
                f"block {k} belongs to another HookedBackbone; give each a module of its own (copy.deepcopy)"
            )


def _shared(blocks: list[nn.Module]) -> str | None:
    """Which blocks share a parameter; None where none do."""
    owner: dict[int, int] = {}
    for k, block in enumerate(blocks, start=1):
        for name, parameter in block.named_parameters():
            if owner.setdefault(id(parameter), k) != k:
                return f"blocks {owner[id(parameter)]} and {k} share the parameter {name}"
    return None
