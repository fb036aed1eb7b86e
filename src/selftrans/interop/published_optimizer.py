"""AdamW's state as other code bases save it => moments by parameter name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from selftrans.models.spec import Named
from selftrans.storage import first_line


def adamw_moments(optimizer: Any, named: Named, may_be_absent: Callable[[str], bool]) -> tuple[dict[str, Named], str]:
    """AdamW's `step`, `exp_avg`, `exp_avg_sq` -> parameter -> tensor, or {} and the reason.

    An optimiser's state_dict() has no names: parameters are numbered in the order in which the model registered them,
    which is the order of the model's state dict. It is used only if every shape matches. Parameters that
    `may_be_absent` (fixed, or not in use) have no state in some files.
    """
    out: dict[str, Named] = {"step": {}, "exp_avg": {}, "exp_avg_sq": {}}
    try:
        ids = [i for group in optimizer["param_groups"] for i in group["params"]]
        for name, i in zip(named, ids, strict=True):
            state = optimizer["state"].get(i)
            if state is None and may_be_absent(name):
                continue
            for moment in ("exp_avg", "exp_avg_sq"):
                if state[moment].shape != named[name].shape or not bool(torch.isfinite(state[moment]).all()):
                    raise ValueError(f"{moment} of {name}")
                out[moment][name] = state[moment].detach()
            out["step"][name] = torch.tensor(float(state["step"]))
            if not 0 <= float(state["step"]) < 1 << 24:  # exact integers in float32
                raise ValueError(f"step of {name}")
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        return {}, f"its optimiser state does not match its parameters ({first_line(error, 80)})"
    return out, ""
