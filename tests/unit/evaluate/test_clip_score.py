"""The CLIP score, compared with cosines computed by hand from the projections of a tiny CLIPModel."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from selftrans.evaluate.clip_score import ClipScorer
from tests.support import captioned
from tests.support.clip import MEAN, SIDE, STD, save_clip

PROMPTS = ["a red square", "the square is blue", "a picture of a grey square on the left", "green"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_clip(tmp_path_factory.mktemp("clip"))


def cosine_by_hand(folder: str, picture: Image.Image, prompt: str) -> float:
    """Resize, crop, normalise, project and multiply, one picture at a time."""
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    scale = SIDE / min(picture.size)
    size = [int(side * scale) for side in picture.size]
    x = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    left, top = ((side - SIDE) // 2 for side in size)
    pixels = np.asarray(x.crop((left, top, left + SIDE, top + SIDE)), dtype=np.float64) / 255
    pixels = torch.tensor((pixels - MEAN) / STD, dtype=torch.float32).permute(2, 0, 1)[None]
    ids = [1, *(captioned.WORDS.index(word) for word in prompt.split()), 2]
    with torch.no_grad():
        image = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)[0].double().numpy()
        text = model.text_projection(model.text_model(input_ids=torch.tensor([ids])).pooler_output)[0].double().numpy()
    return float(image @ text / np.linalg.norm(image) / np.linalg.norm(text))


@pytest.mark.parametrize("size", [(32, 32), (40, 56), (70, 64)])
def test_scores_are_100_times_the_positive_cosine(folder, size):
    pictures = np.random.default_rng(1).integers(0, 256, (4, size[1], size[0], 3), dtype=np.uint8)
    found = ClipScorer(folder).score(pictures, PROMPTS)
    cosines = [cosine_by_hand(folder, Image.fromarray(x), p) for x, p in zip(pictures, PROMPTS, strict=True)]
    np.testing.assert_allclose(found, [100 * max(c, 0) for c in cosines], atol=2e-3)
    assert len({*found.round(3)}) > 1


def test_negative_cosines_count_as_zero(folder):
    pictures, scorer = np.zeros((1, 32, 32, 1), np.uint8), ClipScorer(folder)
    before = scorer.score(pictures, ["a red square"])
    assert cosine_by_hand(folder, Image.fromarray(pictures[0, ..., 0]), "a red square") * 100 == pytest.approx(
        before[0], 1e-4
    )
    scorer.model.text_projection.weight.data.neg_()
    assert (before > 0) == (scorer.score(pictures, ["a red square"]) == 0)


def test_streamed_scores_do_not_depend_on_the_batches(folder, monkeypatch):
    monkeypatch.setattr("selftrans.evaluate.clip_score.CHUNK", 3)
    pictures, prompts = np.random.default_rng(0).integers(0, 256, (11, 32, 32, 3), dtype=np.uint8), (PROMPTS * 3)[:11]
    expected = ClipScorer(folder).score(pictures, prompts)
    for cuts in ([5], [1, 2, 10]):
        scorer = ClipScorer(folder)
        assert np.array_equal(np.concatenate(list(scorer.observe(iter(np.split(pictures, cuts)), prompts))), pictures)
        np.testing.assert_allclose(scorer.scores, expected, atol=1e-3)
        report = scorer.report()
        assert report["clip_score"] == pytest.approx(expected.mean(), abs=1e-3) and report["clip_pictures"] == 11
        assert report["clip_model"] == folder and len(report["clip_model_sha256"]) == 64


def test_unusable_input_is_refused(folder, tmp_path):
    scorer, pictures = ClipScorer(folder), np.zeros((3, 32, 32, 3), np.uint8)
    with pytest.raises(ValueError, match="more pictures than the 2 prompts; give one prompt for each"):
        list(scorer.observe(iter([pictures]), PROMPTS[:2]))
    with pytest.raises(ValueError, match=r"is for pictures, these are arrays of \(2, 8\); leave out --clip"):
        list(scorer.observe(iter([np.zeros((1, 2, 8), np.float32)]), PROMPTS))
    with pytest.warns(UserWarning, match="1 of 2 prompts is longer than 12 tokens and cut off"):
        list(scorer.observe(iter([pictures[:2]]), ["a " * 30, "red"]))
    with pytest.raises(ValueError, match=r"cannot be loaded .* give a CLIPModel of transformers"):
        ClipScorer(str(tmp_path / "missing"))
    bare = captioned.save_text_encoder(tmp_path / "bare", "clip")
    with pytest.raises(
        ValueError, match=r"bare' has no usable tokeniser or picture processor .*; add tokenizer.json and"
    ):
        ClipScorer(bare)
