"""Suggestions for an unknown option: it may be misspelt, lack its section, or have its name in other programs."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from selftrans.suggest import closest, did_you_mean

AUTOMATIC = "the device is found automatically, a GPU if there is one; for several: accelerate launch -m selftrans ..."
SIZE = "the pictures have the size that `selftrans prepare --resolution` gave them"
EPOCHS = ("epochs", "num-epochs", "num-train-epochs")
#: last part of an option of other programs without a counterpart here -> what to do instead
REPLACED = dict.fromkeys(("device", "devices", "cuda", "cpu", "gpu", "gpus", "num-gpus", "ngpus"), AUTOMATIC) | {
    "resume": "the same command again continues what was interrupted",
    **dict.fromkeys(("resolution", "image-size", "img-size"), SIZE),
}
#: last part of an option of other programs -> possible names here, in full or their last part
SYNONYMS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("learning-rate", "base-lr", "blr"), ("lr",)),
    **dict.fromkeys(("batch", "bs", "global-batch-size", "train-batch-size"), ("batch-size",)),
    **dict.fromkeys(EPOCHS, ("train.steps",)),
    **dict.fromkeys(("max-steps", "num-steps", "iterations", "iters"), ("steps",)),
    **dict.fromkeys(("num-sampling-steps", "num-inference-steps", "sampling-steps"), ("steps",)),
    **dict.fromkeys(("cfg", "cfg-scale", "guidance"), ("guidance-scale",)),
    **dict.fromkeys(("num-images", "num-samples", "num-fid-samples", "n-samples"), ("num", "samples", "images")),
    **dict.fromkeys(("size", "image-size", "img-size"), ("resolution",)),
    **dict.fromkeys(("resolution",), ("size",)),
    **dict.fromkeys(("mixed-precision", "amp", "fp16", "bf16", "dtype"), ("precision",)),
    **dict.fromkeys(("output", "output-dir", "outdir", "results-dir", "save-dir"), ("out",)),
    **dict.fromkeys(("data-path", "data-dir", "dataset"), ("data",)),
    **dict.fromkeys(("ckpt", "checkpoint", "pretrained", "weights-file"), ("init",)),
    **dict.fromkeys(("wd",), ("weight-decay",)),
    **dict.fromkeys(("gradient-accumulation-steps", "grad-accum", "accumulation-steps"), ("accumulate",)),
    **dict.fromkeys(("global-seed",), ("seed",)),
    **dict.fromkeys(("log-every", "log-interval", "log-freq", "logging-steps", "print-freq"), ("log.every",)),
    **dict.fromkeys(("save-every", "save-interval", "save-steps", "ckpt-every"), ("checkpoint-every",)),
    **dict.fromkeys(("sample-every",), ("preview-every",)),
    **dict.fromkeys(("class", "class-labels", "class-label", "label"), ("labels",)),
}


def unrecognised(tokens: Sequence[str], known: Sequence[str]) -> str:
    """One line about the first word that is no option, with those that may be meant."""
    flag = next((token.partition("=")[0] for token in tokens if token.startswith("-")), None)
    if flag is None:
        return f"'{tokens[0]}' is one argument too many"
    name = flag.lstrip("-").replace("_", "-")
    last, found = name.rpartition(".")[2], likely(name, known)
    counterparts = [option for option in found if _last(option) == last or _is_synonym(option, last)]
    if last in REPLACED and not counterparts:
        return f"option {flag} is unknown: {REPLACED[last]}"
    steps = ": training is counted in steps" if last in EPOCHS and counterparts else ""
    return f"option {flag} is unknown{steps}{did_you_mean([f'--{option}' for option in found])}"


def _last(option: str) -> str:
    return option.rpartition(".")[2]


def _is_synonym(option: str, word: str) -> bool:
    return bool({option, _last(option)} & set(SYNONYMS.get(word, ())))


def likely(name: str, known: Sequence[str]) -> list[str]:
    """Known options that an unknown one, without its dashes, may mean; at most three, of its own section if it names one.

    First those with the same last part, then those with its name here (SYNONYMS), then similar ones.
    """
    section, last = name[: name.rfind(".") + 1], _last(name)  # "train."
    own = [option for option in known if section and option.startswith(section)]
    for options in (own, known):
        same = [option for option in options if _last(option) == last]
        if found := same or [option for option in options if _is_synonym(option, last)]:
            return (closest(name, found, most=1) if section else []) or found[:3]
    if last in SYNONYMS:  # a known name, so not a misspelling
        return []
    if own:
        lasts = closest(last, [option.removeprefix(section) for option in own], most=1)
        return [section + word for word in lasts]
    return [option for option in closest(name, known, most=1) if _alike(last, _last(option))]


def _alike(word: str, other: str) -> bool:
    return difflib.SequenceMatcher(None, word, other).ratio() >= 0.5
