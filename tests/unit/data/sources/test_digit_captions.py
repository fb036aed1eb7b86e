"""Sentences about digits: what they say, that they are the same everywhere, and that reserved wordings stay reserved."""

import hashlib
import re

import numpy as np
import pytest

from selftrans.data.sources.captions import CaptionSource
from selftrans.data.sources.digit_attributes import ATTRIBUTES, attributes, levels
from selftrans.data.sources.digit_captions import (
    CAPTIONS,
    NAMES,
    RESERVED,
    TRAINED,
    Described,
    captions,
    prompts,
    sentence,
)
from selftrans.data.sources.open_source import open_source


@pytest.fixture(scope="module")
def scans():
    from sklearn.datasets import load_digits

    data = load_digits()
    return np.rint(data.images * (255 / 16)).astype(np.uint8), data.target


@pytest.fixture(scope="module")
def trained(scans):
    return captions(*scans)


def words(said):
    return {word for level in said for phrase in level for word in re.findall(r"\w+", phrase)}


def test_sentences_are_the_same_on_every_machine(trained):
    expected = "this is a zero, slanted to the right, placed to the right, placed high, of large size and in thin lines"
    assert trained[0][0] == expected
    text = "\n".join(line for each in trained for line in each)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "4cdd8421529feeae"


def test_a_caption_says_what_was_measured(scans, trained):
    images, labels = scans
    measured = levels(attributes(images), labels)
    assert all(len(each) == CAPTIONS for each in trained)
    for i in range(0, len(labels), 50):
        for k, text in enumerate(trained[i]):
            digits = set(re.findall(r"\w+", text)) & {*NAMES, *"0123456789"}
            assert len(digits) == 1 and digits < {NAMES[labels[i]], str(labels[i])}
            said = {name: level for name in ATTRIBUTES for level in (-1, 0, 1) if mentions(text, name, level)}
            assert all(level == measured[name][i] for name, level in said.items()), text
            assert len(said) == len(ATTRIBUTES) if k == 0 else len(said) >= 1


def mentions(text, name, level):
    """Whether a sentence of TRAINED says that an attribute has a level."""
    adjectives = TRAINED.adjectives.get(name, ((), (), ()))[level + 1]
    at = re.search(rf"\b({'|'.join([*NAMES, *'0123456789'])})\b", text).start()
    before = re.split(r"[,:]", text[:at])[-1]
    return any(phrase in text for phrase in TRAINED.phrases[name][level + 1]) or bool(
        set(before.split()) & set(adjectives)
    )


def test_every_level_is_said_about_every_digit(scans):
    images, labels = scans
    measured = levels(attributes(images), labels)
    for value in measured.values():
        counts = np.zeros((10, 3))
        np.add.at(counts, (labels, value + 1), 1)
        assert (counts / counts.sum(axis=1, keepdims=True) > 0.3).all()


def test_reserved_wordings_share_no_sentence_and_no_word_of_meaning_with_training(trained):
    seen = {text for each in trained for text in each}
    asked = prompts(2000)
    reserved = {sentence(each, RESERVED, f"{k}") for k, each in enumerate(asked)}
    assert len(reserved) > 1900 and not seen & reserved
    plain = {"an", "to", "the", "of", "in", "with", "from", "a", "left", "right", "not", "and", "or", "part"}
    for kind in ("adjectives", "phrases"):
        for name, said in getattr(RESERVED, kind).items():
            used = words(said) - plain
            assert used and not any(used & set(re.findall(r"\w+", text)) for text in seen), (kind, name)
    frames = {re.sub(r"{.*?}", "", pattern) for pattern in TRAINED.patterns + TRAINED.bare}
    assert not frames & {re.sub(r"{.*?}", "", pattern) for pattern in RESERVED.patterns + RESERVED.bare}


def test_prompts_are_balanced_and_independent():
    asked = prompts(3000)
    assert np.bincount([each.digit for each in asked]).tolist() == [300] * 10
    assert asked == prompts(3000) and asked[:10] != prompts(10, seed=1)
    every = [each for each in asked if len(each.levels) == len(ATTRIBUTES)]
    assert 1400 < len(every) < 1700 and all(each.levels for each in asked)
    table = np.array([[each.levels[name] for name in ATTRIBUTES] for each in every])
    assert np.abs(table.mean(axis=0)).max() < 0.1
    assert np.abs(np.corrcoef(table.T) - np.eye(len(ATTRIBUTES))).max() < 0.1


@pytest.mark.parametrize(
    ("described", "expected"),
    [
        (Described(8, {"slant": 1}), r"an (8|eight)"),
        (Described(3, {"thickness": 1}), r"thick|heavy"),
        (Described(7, {"slant": -1, "row": -1}), r"7|seven"),
    ],
)
def test_sentences_are_english(described, expected):
    texts = {sentence(described, TRAINED, f"{k}") for k in range(50)}
    assert len(texts) > 5 and any(re.search(expected, text) for text in texts)
    for text in texts:
        assert "{" not in text and "  " not in text and text == text.strip()
        assert not re.search(r"\ba (8|eight)|\ban (?!8|eight)", text), text


def test_the_source_has_captions_in_place_of_labels(scans, trained):
    source = open_source("digits_t2i", captions=CaptionSource())
    assert list(source.captions) == trained and source.classes == () and not source.labels.any() and not source.faults
    np.testing.assert_array_equal(source.read(7)[..., 0], scans[0][7])
    assert source.fingerprint != open_source("digits").fingerprint


def test_without_a_text_encoder_the_remedy_is_named():
    with pytest.raises(ValueError, match="digits_t2i are pictures with captions; add --text minilm"):
        open_source("digits_t2i")
