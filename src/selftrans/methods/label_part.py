"""The label's part of a target: the difference of the mean target of its label from the overall mean, per token.

    m_y = mean of f_g over the samples of label y,  m = its mean over all samples           each (T, D), a mean per token
    f_g - (1 - kept) (m_y - m)                                                                     the target that is used

The means are of f_g, not of f_c - f_u: the student reads its label, so it can predict everything in f_g that follows from the
label alone, in f_c and in f_u. The overall mean m stays in the target: it does not depend on the label.
Shape legend: M samples that a guidance computes, T tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from selftrans.types import Cond, Conditions


class LabelPart(nn.Module):
    """Running means of the targets by label and token: (classes + 1) T D float32, the last row that of all samples.

    They are buffers, so that a checkpoint holds them and a resumed run continues with them. No gradient, no value read on the
    host, static shapes. With several processes DDP copies the means of the first process to all at the start of each step.
    """

    mean: Tensor
    count: Tensor

    def __init__(self, conditions: Conditions, tokens: int, width: int) -> None:
        """ValueError unless the conditions are labels."""
        super().__init__()
        if conditions.kind != "labels":
            raise ValueError(f"stage2.label_part needs labels, the data have {conditions}; set stage2.label_part keep")
        self.register_buffer("mean", torch.zeros(conditions.num_classes + 1, tokens, width))
        self.register_buffer("count", torch.zeros(conditions.num_classes + 1))

    @torch.no_grad()
    def forward(self, target: Tensor, labels: Cond, valid: Tensor, kept: float | Tensor) -> Tensor:
        """Targets (M, T, D) with the share `kept` of the label's part, by the means of earlier batches; then update the means.

        labels: (M,) true labels. valid: (M,) bool, false for padding. A label without an earlier target has no part.
        ValueError for another number of tokens than the means have.
        """
        assert isinstance(labels, Tensor)
        if target.shape[1:] != self.mean.shape[1:]:
            raise ValueError(
                f"stage2.label_part has means of {self.mean.shape[1]} tokens, and this batch has {target.shape[1]}; give data "
                "of one size, or set stage2.label_part keep"
            )
        known = (self.count[labels] > 0).float()[:, None, None]
        part = known * (self.mean[labels] - self.mean[-1])
        self._update(target, labels, valid)
        return target - (1 - kept) * part

    def _update(self, target: Tensor, labels: Tensor, valid: Tensor) -> None:
        """Add targets to the means, without those that are not finite."""
        valid = valid & target.isfinite().all(dim=2).all(dim=1)
        x = torch.where(valid[:, None, None], target, 0.0).flatten(1)  # (M, T D)
        # sums over the rows of the same label by a product: index_add_ would add in a random order on a GPU
        same = ((labels[:, None] == labels[None, :]) & valid[None, :]).float()  # (M, M)
        with torch.autocast(x.device.type, enabled=False):
            sums, number = (same @ x).view_as(target), same.sum(dim=1)  # (M, T, D), (M,): equal in rows of equal labels
        total = self.count[labels] + number
        old = self.mean[labels]
        step = (sums - number[:, None, None] * old) / total.clamp(min=1)[:, None, None]
        self.mean[labels], self.count[labels] = old + step, total
        self.count[-1] += valid.sum(dim=0)
        overall = x.sum(dim=0).view_as(self.mean[-1])
        self.mean[-1] += (overall - valid.sum(dim=0) * self.mean[-1]) / self.count[-1].clamp(min=1)
