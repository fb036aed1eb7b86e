"""The conditions of images: labels, prompts, stored captions."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from selftrans.config import SampleConfig
from selftrans.data.dataset import Dataset
from selftrans.encoders.text import Lost, load_text_encoder
from selftrans.sampling import conditioning as module
from selftrans.sampling.conditioning import (
    CaptionConditioning,
    LabelConditioning,
    PromptConditioning,
    captions_of,
    conditioning_of,
    conditions_for,
    read_prompts,
)
from selftrans.types import MASK, TEXT, Conditions
from tests.support import captioned


def test_labels_of_every_mode():
    k, ten, none = np.array([0, 3, 9, 25]), Conditions("labels", 10), Conditions("none")
    assert conditions_for(k, ten, "balanced").tolist() == [0, 3, 9, 5]
    assert conditions_for(k, ten, (7, 2)).tolist() == [7, 2, 2, 2]
    assert conditions_for(k, none, "random").tolist() == conditions_for(k, none, "balanced").tolist() == [0] * 4
    assert conditions_for(k, ten, (10,)).tolist() == [10] * 4, "the null label may be asked for"
    many = conditions_for(np.arange(2000), ten, "random", 3)
    assert many.dtype == torch.int64 and torch.equal(many[[9, 4]], conditions_for([9, 4], ten, "random", 3))
    assert np.bincount(many, minlength=10).min() > 150
    assert not torch.equal(many, conditions_for(np.arange(2000), ten, "random", 4))
    for wrong in ((11,), (-1,), ()):
        with pytest.raises(ValueError, match="10 classes"):
            conditions_for(k, ten, wrong)


def test_labels_are_conditions_and_labels():
    found = conditioning_of(Conditions("labels", 10), SampleConfig(labels=(3, 1)))
    assert isinstance(found, LabelConditioning) and found.described == {"labels": (3, 1)}
    cond, labels = found.of(np.array([5, 2]))
    assert cond.tolist() == labels.tolist() == [1, 3] and found.texts(np.array([0])) is None


class Counting:
    """An encoder whose tokens say which text they are of, and which texts were encoded together."""

    name, tokens, width, sha256 = "counting", 4, 3, "s" * 64

    def __init__(self):
        self.calls = []

    def lost(self, texts):
        return Lost(sum(len(text.split()) > 4 for text in texts), sum("?" in text for text in texts))

    def encode(self, texts):
        self.calls.append(list(texts))
        rows = torch.tensor([float(text.split()[0]) if text else -1.0 for text in texts])
        mask = torch.arange(4) < torch.tensor([[len(text.split())] for text in texts])
        return {TEXT: rows[:, None, None].expand(-1, 4, 3), MASK: mask}


def test_image_k_has_prompt_k_modulo_their_number():
    encoder = Counting()
    found = PromptConditioning(["7", "8 8", "9 9 9"], encoder)
    cond, labels = found.of(np.array([0, 4, 5, 3]))
    assert labels.tolist() == [0, 1, 2, 0] and cond[TEXT].shape == (4, 4, 3)
    assert cond[TEXT][:, 0, 0].tolist() == [7, 8, 9, 7] and cond[MASK].sum(dim=1).tolist() == [1, 2, 3, 1]
    assert found.texts(np.array([4, 0])) == ["8 8", "7"] and encoder.calls == [[""], ["7", "8 8", "9 9 9"]]
    assert found.null[TEXT].shape == (1, 4, 3) and found.null[TEXT].eq(-1).all() and not found.null[MASK].any()
    assert found.described == {"prompts": ["7", "8 8", "9 9 9"], "text_encoder_sha256": "s" * 64}


def test_many_prompts_are_encoded_in_fixed_groups_of_which_few_are_kept(monkeypatch):
    monkeypatch.setattr(module, "GROUP", 2)
    monkeypatch.setattr(module, "KEPT", 4)
    few, many = Counting(), Counting()
    PromptConditioning([str(k) for k in range(4)], few)
    assert few.calls == [[""], ["0", "1"], ["2", "3"]], "at once"
    found = PromptConditioning([str(k) for k in range(7)], many)
    assert many.calls == [[""]]
    for indices in ([6], [0, 3], [1], [13, 2, 5]):
        cond, labels = found.of(np.array(indices))
        assert cond[TEXT][:, 0, 0].tolist() == labels.tolist() == [k % 7 for k in indices]
        assert len(found._groups) <= 2
    assert many.calls[1:] == [["6"], ["0", "1"], ["2", "3"], ["6"], ["4", "5"]], "never in the groups of a batch"


def test_long_prompts_are_counted_in_a_warning():
    with pytest.warns(UserWarning, match=r"2 of 3 prompts are longer than 4 tokens; the rest is cut off"):
        PromptConditioning(["1 2 3 4 5", "1", "1 2 3 4 5 6"], Counting())
    with pytest.warns(UserWarning, match=r"1 of 2 prompts is longer"):
        PromptConditioning(["1", "1 2 3 4 5"], Counting())
    with pytest.warns(
        UserWarning, match="1 of 2 prompts is in part unknown to text encoder counting, which reads every"
    ):
        PromptConditioning(["1", "1 ?"], Counting())
    with pytest.warns(UserWarning, match=r"the prompt is longer than 4 tokens"):
        PromptConditioning(["1 2 3 4 5"], Counting())
    with pytest.raises(ValueError, match="no prompts are given"):
        PromptConditioning([], Counting())


def text_conditions() -> Conditions:
    return Dataset.open(captioned.shared()).manifest.conditions


def test_prompts_are_encoded_by_the_encoder_of_the_model(tmp_path):
    conditions, settings = text_conditions(), SampleConfig(prompts=("a red square", ""))
    cond, labels = conditioning_of(conditions, settings).of(np.arange(3))
    expected = load_text_encoder(conditions.encoder, conditions.tokens).encode(["a red square", "", "a red square"])
    assert torch.equal(cond[TEXT], expected[TEXT]) and torch.equal(cond[MASK], expected[MASK])
    assert labels.tolist() == [0, 1, 0]
    moved = Path(conditions.encoder).rename(tmp_path / "moved")
    try:
        with pytest.raises(ValueError, match=r"encoder is not there; give the one that .* with --text-encoder PATH"):
            conditioning_of(conditions, settings)
        again, _ = conditioning_of(conditions, settings, text_encoder=str(moved)).of(np.arange(3))
        assert torch.equal(again[TEXT], cond[TEXT])
    finally:
        moved.rename(conditions.encoder)


def test_other_encoder_is_refused(tmp_path):
    other = captioned.save_text_encoder(tmp_path / "other", seed=1)
    with pytest.raises(
        ValueError, match=r"other is not the text encoder that prepared the data \(sha256 \w{12}, not \w{12}\); give"
    ):
        conditioning_of(text_conditions(), SampleConfig(prompts=("a",)), text_encoder=other)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty' cannot be loaded .*; give the one that .* with --text-encoder PATH"):
        conditioning_of(text_conditions(), SampleConfig(prompts=("a",)), text_encoder=str(tmp_path / "empty"))
    wide = Conditions("text", tokens=12, width=24)
    with pytest.raises(ValueError, match=r"other gives tokens of 16 channels, not 24; "):
        conditioning_of(wide, SampleConfig(prompts=("a",)), text_encoder=other)
    nameless = Conditions("text", tokens=4, width=3, sha256="0" * 64)
    with pytest.raises(ValueError, match="the text encoder has no name here; give the one"):
        conditioning_of(nameless, SampleConfig(prompts=("a",)))


@pytest.mark.parametrize(
    ("conditions", "settings", "encoder", "message"),
    [
        (
            Conditions("labels", 10),
            {"prompts": ("a",)},
            None,
            "prompts are for models of text, this one is of 10 classes",
        ),
        (Conditions("none"), {"prompts": ("a",)}, None, "this one is of no condition; leave them out"),
        (Conditions("labels", 10), {}, "minilm", "a text encoder is for models of text"),
        (
            Conditions("text", tokens=4, width=3, encoder="x"),
            {"labels": (3,)},
            None,
            "labels are for models of classes",
        ),
        (
            Conditions("text", tokens=4, width=3, encoder="x"),
            {"labels": "random"},
            None,
            "this one is of text of 4x3 by x",
        ),
        (Conditions("text", tokens=4, width=3, encoder="x"), {}, None, "no prompts are given; write --prompts"),
    ],
)
def test_conditions_of_another_kind_are_refused(conditions, settings, encoder, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        conditioning_of(conditions, SampleConfig(**settings), text_encoder=encoder)


# ---- stored captions


def test_stored_captions_need_no_encoder_and_each_row_comes_once():
    dataset = Dataset.open(captioned.shared())
    found, count = captions_of(dataset, text_conditions()), len(dataset)
    indices = np.arange(2 * count)
    cond, rows = found.of(indices)
    texts = found.texts(indices)
    assert sorted(rows[:count]) == sorted(rows[count:]) == list(range(count)) and rows[:count].tolist() != sorted(
        rows[:count]
    )
    assert all(text in captioned.sentences(row) for text, row in zip(texts, rows, strict=True))
    assert len(set(texts[:count])) > 4 and texts[:count] != texts[count:], "another caption in the second pass"
    expected = load_text_encoder(text_conditions().encoder).encode(texts)
    assert torch.equal(cond[MASK], expected[MASK])
    torch.testing.assert_close(cond[TEXT].float(), expected[TEXT], atol=2e-3, rtol=2e-3)  # stored in half precision
    few, their_rows = found.of(np.array([5, 1]))
    assert their_rows.tolist() == rows[[5, 1]].tolist() and torch.equal(few[TEXT], cond[TEXT][[5, 1]])
    assert CaptionConditioning(dataset, seed=1).texts(indices) != texts


def test_rows_that_are_given_repeat_with_their_first_captions():
    dataset = Dataset.open(captioned.shared())
    assert [captioned.sentences(row)[0] for row in dataset.prompt_rows.tolist()] == list(dataset.prompts)
    found = CaptionConditioning(dataset, rows=dataset.prompt_rows[:3])
    cond, rows = found.of(np.array([4, 0]))
    assert rows.tolist() == dataset.prompt_rows[[1, 0]].tolist()
    assert found.texts(np.array([4, 0])) == [dataset.prompts[1], dataset.prompts[0]]
    assert torch.equal(cond[TEXT], dataset.text(rows)[TEXT])


def test_captions_of_another_encoder_are_refused(tmp_path):
    dataset = Dataset.open(captioned.shared())
    other = Conditions("text", tokens=12, width=16, sha256="0" * 64, encoder="x")
    with pytest.raises(
        ValueError, match=r"has text of 12x16 by .*, the model was trained on text of 12x16 by x; prepare"
    ):
        captions_of(dataset, other)


# ---- prompts on the command line


def test_words_are_prompts_and_files_are_their_lines(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa thick three\r\n\r\n  ein schräger Fünfer \n\n".encode())
    assert read_prompts([str(path)]) == ("a thick three", "ein schräger Fünfer")
    assert read_prompts(["one", str(path), "", "x" * 5000]) == (
        "one",
        "a thick three",
        "ein schräger Fünfer",
        "",
        "x" * 5000,
    )
    assert read_prompts(["what is in readme.txt"]) == ("what is in readme.txt",)


def test_prompts_are_cleaned_as_captions_are(tmp_path):
    """Bytes that are no UTF-8 arrive as lone surrogates, which no tokeniser takes."""
    family = "\U0001f468\u200d\U0001f469"  # one emoji, joined
    path = tmp_path / "prompts"
    path.write_text(f"a\x1b[31m dog\r\n\x07\n{family}\n", encoding="utf-8")
    assert read_prompts(["a\t red\x00 \udcff dog ", str(path)]) == ("a red ? dog", "a [31m dog", family)


def test_unusable_files_of_prompts_are_refused(tmp_path, monkeypatch):
    wanted = "give a text file with one prompt per line"
    missing, blank, binary = (tmp_path / name for name in ("missing.txt", "blank.txt", "binary"))
    blank.write_text("\n  \n")
    binary.write_bytes(b"\xff\xfe\x00\x01")
    for path, message in ((missing, "does not exist"), (blank, "has no prompts"), (binary, "cannot be read (")):
        with pytest.raises(ValueError, match=rf"{re.escape(f'{path} {message}')}.*{wanted}"):
            read_prompts([str(path)])
    monkeypatch.setattr(module, "MAX_PROMPTS", 3)
    with pytest.raises(ValueError, match="is larger than 0 MB"):
        read_prompts([str(binary)])
    with pytest.raises(ValueError, match="no prompts are given"):
        read_prompts([])
