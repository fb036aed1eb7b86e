"""CLIP score: how well pictures fit their prompts, by a CLIPModel of transformers.

    score = mean of 100 max(cos(picture, prompt), 0)

which is what torchmetrics prints for positive cosines. CLIP-S of Hessel et al. (2104.08718) is 2.5 max(cos, 0), so 0.025
times this, with the words "A photo depicts" before each prompt, which are not added here. Scores of two models cannot be
compared. Shape legend: n pictures, (H, W, C) picture.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from selftrans.encoders.pretrained import encoder_name, load_model, sha256_of
from selftrans.messages import are, first_line, plural

CHUNK = 64  #: pictures at a time
UNUSED = ("position_ids",)  #: weights that checkpoints may lack


class ClipScorer:
    """Scores pictures as they stream past, each with its own prompt.

    Attributes:
        name: hub id, or absolute folder. sha256: of the weights.
        scores: one for each picture so far, 0 to 100.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        """Load the model, its tokeniser and its picture processor. ValueError where they are missing or no CLIPModel's."""
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        model, absent = load_model(CLIPModel, name, name, "a CLIPModel", UNUSED)
        try:
            self.processor: Any = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except Exception as error:  # the type depends on what is missing
            raise ValueError(
                f"CLIP model {name!r} has no usable tokeniser or picture processor ({first_line(error, 200)}); add "
                "tokenizer.json and preprocessor_config.json"
            ) from error
        self.model: Any = model.to(device).requires_grad_(False).eval()
        self.name, self.device = encoder_name(name), device
        self.sha256 = sha256_of({key: x for key, x in model.state_dict().items() if key not in absent})
        self.tokens = int(model.config.text_config.max_position_embeddings)
        self.scores: list[float] = []

    def observe(self, batches: Iterator[np.ndarray], prompts: Sequence[str]) -> Iterator[np.ndarray]:
        """Yield the batches of pictures uint8 (n, H, W, C) unchanged, and score each with its prompt, in order.

        Raises ValueError for arrays that are not pictures, and unless there is a prompt for each picture.
        """
        self._warn_of_long(prompts)
        for images in batches:
            if images.dtype != np.uint8:
                raise ValueError(
                    f"the CLIP score is for pictures, these are arrays of {images.shape[1:]}; leave out --clip"
                )
            start = len(self.scores)
            if start + len(images) > len(prompts):
                raise ValueError(
                    f"there are more pictures than the {plural(len(prompts), 'prompt')}; give one prompt for each"
                )
            for first in range(0, len(images), CHUNK):
                part = images[first : first + CHUNK]
                self.scores += self.score(part, prompts[start + first : start + first + len(part)]).tolist()
            yield images

    @torch.inference_mode()
    def score(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """100 max(cos, 0) of pictures uint8 (n, H, W, C) and their prompts (n,): float64 (n,). Grey pictures become RGB."""
        rgb = images.repeat(3, axis=-1) if images.shape[-1] == 1 else images[..., :3]
        pixels = self.processor(images=list(rgb), return_tensors="pt", input_data_format="channels_last")
        options = {"padding": True, "truncation": True, "max_length": self.tokens, "return_tensors": "pt"}
        words = self.tokenizer(list(prompts), **options)
        out = self.model(
            input_ids=words["input_ids"].to(self.device),
            attention_mask=words["attention_mask"].to(self.device),
            pixel_values=pixels["pixel_values"].to(self.device),
        )
        cosines = (out.image_embeds.double() * out.text_embeds.double()).sum(dim=-1)  # both have length 1
        return (100 * cosines.clamp(min=0)).cpu().numpy()

    def report(self) -> dict[str, Any]:
        """The mean over the pictures so far, and what it depends on."""
        return {
            "clip_score": float(np.mean(self.scores)),
            "clip_model": self.name,
            "clip_model_sha256": self.sha256,
            "clip_pictures": len(self.scores),
        }

    def _warn_of_long(self, prompts: Sequence[str]) -> None:
        different = list(dict.fromkeys(prompts))
        ids = self.tokenizer(different, truncation=False, verbose=False)["input_ids"]
        longer = sum(len(one) > self.tokens for one in ids)
        if longer:
            warnings.warn(
                f"CLIP score: {longer:,} of {plural(len(different), 'prompt')} {are(longer)} longer than {self.tokens} "
                "tokens and cut off",
                stacklevel=4,
            )
