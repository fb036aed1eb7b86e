"""The null condition of text, in the buffers of a backbone."""

import pytest
import torch

from selftrans.models.text_null import TextNull
from selftrans.types import MASK, TEXT, Conditions


def kept(tokens=3, width=2):
    module = TextNull()
    module.keep_null(Conditions("text", tokens=tokens, width=width))
    return module


def row(tokens=3, width=2):
    text = torch.arange(tokens * width, dtype=torch.float32).view(1, tokens, width)
    return {TEXT: text, MASK: torch.arange(tokens)[None] == 0}


def test_null_is_refused_until_it_is_given():
    module, cond = kept(), {k: v.expand(4, *v.shape[1:]) for k, v in row().items()}
    with pytest.raises(ValueError, match="no null condition yet; call use_null with the tokens of the empty caption"):
        module.null(cond)
    module.use_null(row())
    null = module.null({TEXT: cond[TEXT].half(), MASK: cond[MASK]})
    assert null[TEXT].dtype == torch.float16 and null[MASK].dtype == torch.bool
    assert all(torch.equal(null[k][3].float(), row()[k][0].float()) for k in (TEXT, MASK))


def test_it_is_saved_with_the_model():
    module, other = kept(), kept()
    module.use_null(row())
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.null(row())[TEXT], row()[TEXT])


def test_text_of_another_encoder_is_refused():
    with pytest.raises(ValueError, match=r"the empty caption has shape \(1, 3, 5\), this model takes \(1, 3, 2\)"):
        kept().use_null(row(3, 5))


def test_other_conditions_are_refused():
    with pytest.raises(ValueError, match="is conditioned on text; the data have 10 classes"):
        TextNull().keep_null(Conditions("labels", 10))
