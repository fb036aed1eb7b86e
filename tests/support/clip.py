"""A tiny CLIPModel with random weights and its processors, saved as `transformers` saves them."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.captioned import save_text_encoder

MEAN, STD, SIDE = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3], 32


def save_clip(folder: Path, *, seed: int = 0) -> str:
    """A CLIPModel that reads pictures of 32 x 32 (others: shortest side to 32, bicubic, then the centre) and 12 tokens."""
    save_text_encoder(folder, "clip", seed=seed)
    settings = {"image_processor_type": "CLIPImageProcessor", "image_mean": MEAN, "image_std": STD}
    settings |= {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}, "resample": 3}
    settings |= dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"), True)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(folder)
