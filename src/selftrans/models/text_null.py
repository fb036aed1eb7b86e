"""The null condition of a backbone whose condition is text: the tokens of the empty caption, kept in its buffers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from selftrans.types import MASK, TEXT, Cond, Conditions


def check_text(name: str, conditions: Conditions) -> None:
    """ValueError unless a model `name` that is conditioned on text gets it."""
    if conditions.kind != "text":
        raise ValueError(
            f"{name} is conditioned on text; the data have {conditions}; prepare them with captions (--text), or choose a "
            "model.name of SiT, DiT or LightningDiT"
        )


class TextNull(nn.Module):
    """Gives a backbone `use_null` and `null` for text. The buffers are saved with the model: sampling needs no data."""

    null_text: Tensor  #: (1, L, E) float32
    null_mask: Tensor  #: (1, L) bool
    null_set: bool  #: whether the buffers hold a null condition

    def keep_null(self, conditions: Conditions) -> None:
        """Register the buffers. ValueError unless the condition is text."""
        name = type(self).__name__
        check_text(name, conditions)
        if min(conditions.tokens, conditions.width) < 1:
            raise ValueError(f"{name} needs text tokens; the data have {conditions}; prepare them again with captions")
        self.register_buffer("null_text", torch.zeros(1, conditions.tokens, conditions.width))
        self.register_buffer("null_mask", torch.zeros(1, conditions.tokens, dtype=torch.bool))
        self.null_set = False
        self.register_load_state_dict_post_hook(_find_null)

    @torch.no_grad()
    def use_null(self, cond: Cond) -> None:
        """Keep the empty caption: text (1, L, E), mask (1, L). ValueError for other shapes."""
        assert isinstance(cond, dict)
        for buffer, given in ((self.null_text, cond[TEXT]), (self.null_mask, cond[MASK])):
            if buffer.shape != given.shape:
                raise ValueError(
                    f"the empty caption has shape {tuple(given.shape)}, this model takes {tuple(buffer.shape)}; prepare the "
                    "data with the text encoder of the model"
                )
            buffer.copy_(given)
        self.null_set = True

    def null(self, cond: Cond) -> Cond:
        """The empty caption for each row of `cond`: views of one row, in its dtype. ValueError without `use_null`."""
        assert isinstance(cond, dict)
        if not self.null_set:
            raise ValueError("this model has no null condition yet; call use_null with the tokens of the empty caption")
        n = cond[TEXT].shape[0]
        return {
            TEXT: self.null_text.to(cond[TEXT].dtype).expand(n, -1, -1),
            MASK: self.null_mask.to(cond[MASK].dtype).expand(n, -1),
        }


def _find_null(module: TextNull, _: Any) -> None:
    """After loading, set `null_set`: buffers of zeros mean that the saved model had no null condition."""
    if not module.null_text.is_meta:
        module.null_set = bool(module.null_text.any() or module.null_mask.any())
