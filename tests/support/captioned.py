"""Small pictures with captions, tiny text encoders with random weights, and data prepared from both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from selftrans.config import RunConfig
from selftrans.data.encode_captions import TextOptions
from selftrans.data.prepare import prepare
from tests.support import toy
from tests.support.pictures import encoded, write
from tests.support.shared import once

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "grey": (128, 128, 128)}
PLACES = ("left", "right")
WORDS = ("[PAD]", "[BOS]", "[EOS]", "[UNK]", "a", "the", "is", "on", "square", "picture", "of", *COLOURS, *PLACES)
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": len(WORDS)}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2} | SPECIAL


def _clip() -> transformers.PreTrainedModel:
    vision = SIZES | {"image_size": 32, "patch_size": 8}
    text = SIZES | SPECIAL | {"max_position_embeddings": 12}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))


#: name -> a new model with random weights
FAMILIES = {
    "clip": _clip,
    "clip text": lambda: transformers.CLIPTextModel(
        transformers.CLIPTextConfig(**SIZES, **SPECIAL, max_position_embeddings=12)
    ),
    "t5": lambda: transformers.T5EncoderModel(transformers.T5Config(**T5)),
    "t5 with decoder": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
    "bert": lambda: transformers.BertModel(
        transformers.BertConfig(**SIZES, vocab_size=len(WORDS), max_position_embeddings=20)
    ),
}


def save_text_encoder(folder: Path, family: str = "clip text", *, seed: int = 0) -> str:
    """A model of FAMILIES with random weights, and a tokeniser of WORDS that starts with [BOS] and ends with [EOS]."""
    torch.manual_seed(seed)
    model = FAMILIES[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[BOS]", 1), ("[EOS]", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[BOS] $A [EOS]", special_tokens=ends)
    names = {"pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": "[UNK]"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.save_pretrained(folder)
    return str(folder)


def sentences(i: int) -> list[str]:
    """The captions of picture i: three of even ones, one of odd ones."""
    colour, place = list(COLOURS)[i % 4], PLACES[i // 4 % 2]
    said = [f"a {colour} square on the {place}", f"the square is {colour}", f"a picture of a square on the {place}"]
    return said if i % 2 == 0 else said[:1]


def picture(i: int, side: int = 8) -> np.ndarray:
    """(side, side, 3) uint8: the square of which `sentences` speaks, on black."""
    out = np.zeros((side, side, 3), dtype=np.uint8)
    start = 0 if i // 4 % 2 == 0 else side // 2
    out[side // 4 : 3 * side // 4, start : start + side // 2] = list(COLOURS.values())[i % 4]
    return out


def pictures(folder: Path, count: int = 16, side: int = 8) -> Path:
    """Files 000.png with 000.txt, and so on: one caption on each line."""
    files = {}
    for i in range(count):
        files[f"{i:03d}.png"] = encoded(picture(i, side))
        files[f"{i:03d}.txt"] = "\n".join(sentences(i)).encode()
    return write(folder, files)


def prepared(
    folder: Path,
    *,
    count: int = 16,
    side: int = 8,
    encoder: str | None = None,
    tokens: int | None = None,
    store: Any = "tokens",
    **options: Any,
) -> Path:
    """Such pictures, prepared as pixels with tokens of `encoder` (None: a tiny CLIP of 12 tokens of width 16).

    "minilm" as the encoder is a real one, of width 384, and takes two seconds to load.
    """
    name = encoder or save_text_encoder(folder / "encoder")
    text = TextOptions(name, tokens, store=store)
    prepare(pictures(folder / "pictures", count, side), folder / "data", text=text, progress=False, **options)
    return folder / "data"


@once
def shared() -> Path:
    """Prepared data with the tiny encoder that all tests share: copy it before you change it."""
    return prepared(toy.place("captioned"))


#: dotted override -> value, besides those of `toy.TOY`: blocks of three, and no rounding to bf16
SMALL: dict[str, Any] = {
    "stage1.block": 1,
    "stage2.student_block": 2,
    "stage2.teacher_block": 2,
    "train.precision": "fp32",
}


def config(dotted: dict[str, Any] | None = None) -> RunConfig:
    """The recipe mmdit_coco at toy size, on the shared pictures with captions."""
    dotted = dotted or {}
    path = dotted.get("data.path") or str(shared())
    return toy.toy(SMALL | dotted | {"data.path": path}, name="mmdit_coco")
