"""The null condition of a text-conditional backbone: the tokens of the empty caption, kept in its buffers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from selftrans.types import MASK, TEXT, Cond, Conditions


class TextNull(nn.Module):
    """Gives a backbone `use_null` and `null` for text. Until `use_null` the null tokens are zeros, none of them masked.

    The buffers are saved with the model, so that samples from a checkpoint need no data.
    """

    null_text: Tensor  #: (L, E)
    null_mask: Tensor  #: (L,) bool

    def keep_null(self, conditions: Conditions) -> None:
        """Register the buffers. ValueError unless the condition is text."""
        if conditions.kind != "text":
            raise ValueError(
                f"{type(self).__name__} is conditioned on text; the data have {conditions}; choose another model"
            )
        self.register_buffer("null_text", torch.zeros(conditions.tokens, conditions.width))
        self.register_buffer("null_mask", torch.ones(conditions.tokens, dtype=torch.bool))

    def use_null(self, cond: Cond) -> None:
        """Keep one row of text, {text (1, L, E), mask (1, L)}. ValueError for another shape."""
        assert isinstance(cond, dict)
        if cond[TEXT].shape[1:] != self.null_text.shape:
            raise ValueError(
                f"the empty caption has {tuple(cond[TEXT].shape[1:])} tokens and channels, the model takes "
                f"{tuple(self.null_text.shape)}; prepare the data with the text encoder of the model"
            )
        self.null_text.copy_(cond[TEXT][0])
        self.null_mask.copy_(cond[MASK][0])

    def null(self, cond: Cond) -> Cond:
        """The empty caption for each row of `cond`, in its data types."""
        assert isinstance(cond, dict)
        return {
            TEXT: self.null_text.to(cond[TEXT].dtype).expand(len(cond[TEXT]), -1, -1),
            MASK: self.null_mask.to(cond[MASK].dtype).expand(len(cond[MASK]), -1),
        }
