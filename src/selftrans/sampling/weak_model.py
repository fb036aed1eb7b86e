"""The weaker model of autoguidance: loaded, and compared with the model that it guides."""

from __future__ import annotations

import warnings

from selftrans.checkpoints.load import LoadedModel, load_model
from selftrans.config import SampleConfig
from selftrans.encoders.identity import same_latents, scales_differ
from selftrans.messages import printable


def weak_model(loaded: LoadedModel, settings: SampleConfig) -> LoadedModel | None:
    """The weaker model of `settings.autoguidance`, of the same kind of weights; None without one, and with scale 1.

    ValueError where it is not a model of the same latents, conditions and path; a warning where another autoencoder may have
    made its latents.
    """
    if settings.autoguidance is None or settings.guidance_scale == 1:
        return None
    weak = load_model(settings.autoguidance, weights=loaded.weights)
    name = printable(settings.autoguidance)
    alike = tuple(weak.model.shape) == tuple(loaded.model.shape) and weak.config.train.path == loaded.config.train.path
    if not alike or not weak.model.conditions.fits(loaded.model.conditions):
        theirs, ours = (
            f"latents {tuple(m.model.shape)} with {m.model.conditions} on the {m.config.train.path} path"
            for m in (weak, loaded)
        )
        raise ValueError(
            f"autoguidance {name} is a model of {theirs}, the sampled one of {ours}; give one of the same data"
        )
    own, other = loaded.autoencoder, weak.autoencoder
    if scales_differ(other, own):
        raise ValueError(
            f"autoguidance {name} is a model of {printable(other)}, the sampled one of {printable(own)}, latents of another "
            "scale; give one of the same data"
        )
    if not same_latents(other, own):
        warnings.warn(
            f"autoguidance {name} names the autoencoder {printable(other)}, the sampled model {printable(own)}; unless "
            "both are one, it misleads: give a model of these latents",
            stacklevel=4,
        )
    return weak
