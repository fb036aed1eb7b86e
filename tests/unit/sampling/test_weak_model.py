"""The weaker model of autoguidance belongs to the same latents, conditions and path."""

from __future__ import annotations

import re

import pytest

from selftrans.checkpoints.load import load_model
from selftrans.config import SampleConfig
from selftrans.models.sit import SiT
from selftrans.sampling import weak_model as module
from selftrans.sampling.weak_model import weak_model
from tests.support import toy


@pytest.mark.parametrize(
    ("changed", "theirs"),
    [
        (
            {"model": SiT((1, 8, 8), 2, width=16, depth=1, heads=2, patch=2)},
            "latents (1, 8, 8) with 2 classes on the linear",
        ),
        (
            {"model": SiT((1, 4, 4), 10, width=16, depth=1, heads=2, patch=2)},
            "latents (1, 4, 4) with 10 classes on the linear",
        ),
        (
            {"config": toy.toy({"data.path": "-", "train.path": "cosine"})},
            "latents (1, 8, 8) with 10 classes on the cosine",
        ),
    ],
)
def test_weak_models_of_other_data_are_refused(monkeypatch, changed, theirs):
    loaded = load_model(toy.finished())
    monkeypatch.setattr(module, "load_model", lambda path, *, weights: loaded._replace(**changed))
    settings = SampleConfig(autoguidance="other", guidance_scale=2.0)
    message = f"autoguidance other is a model of {theirs}"
    with pytest.raises(ValueError, match=rf"{re.escape(message)}.*, the sampled one of .*; give one of the same data"):
        weak_model(loaded, settings)
    assert weak_model(loaded, SampleConfig(autoguidance="other")) is None


def test_latents_of_another_scale_are_refused_and_of_another_autoencoder_warned_of(monkeypatch):
    loaded = load_model(toy.finished())
    settings = SampleConfig(autoguidance="other", guidance_scale=2.0)
    given = loaded._replace(autoencoder="pixel(shift=0.5,scale=3.0)")
    monkeypatch.setattr(module, "load_model", lambda path, *, weights: given)
    with pytest.raises(
        ValueError, match=r"autoguidance other is a model of pixel\(shift=0.5,scale=3.0\), .* another scale"
    ):
        weak_model(loaded, settings)
    given = loaded._replace(autoencoder="owner/vae")
    with pytest.warns(
        UserWarning, match="autoguidance other names the autoencoder owner/vae, the sampled model own/vae"
    ):
        assert weak_model(loaded._replace(autoencoder="own/vae"), settings) is given
    given = loaded
    assert weak_model(loaded, settings) is loaded
