"""The model card: texts from files do not change it."""

import pytest

from selftrans.checkpoints.load import load_model
from selftrans.interop.model_card import card, cell
from selftrans.interop.run_facts import made_with
from tests.support import toy
from tests.support.toy import quick  # noqa: F401 - a fixture


def a_card(loaded=None, **given):
    known = {"data": None, "compute": None, "evaluations": [], "samples": None} | given
    return card("me/digits", "mit", loaded or load_model(toy.vanilla()), **known)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a|b", r"a\|b"),
        ("<script>", r"\<script\>"),
        ("[x](http://y)", r"\[x\]\(http://y\)"),
        ("two\nlines", r"two\\nlines"),
    ],
)
def test_markup_in_texts_has_no_effect(text, shown):
    assert cell(text) == shown


def test_card_names_what_is_unknown():
    text = a_card()
    assert "None were measured on these weights." in text
    assert "What the training took is not recorded" in text and "![samples]" not in text
    assert "selftrans sample hf://me/digits --out samples" in text and "class_labels=[0, 1]" in text


def test_names_in_files_stay_text():
    loaded = load_model(toy.vanilla())
    text = a_card(
        loaded._replace(autoencoder="/home/me/vae```\n# heading", stage="x\n---"),
        data={"source": "/data/<img src=x>", "count": 1797},
    )
    assert (
        "/home/me" not in text and "\n# heading" not in text and r" \<img src=x\>" in text and "1,797 samples" in text
    )
    assert text.count("\n---\n") == 1
    made = {"steps": "<b>", "sampler": "a"}
    report = {"metric": "fid", "fid": 1.0, "num_images": "[x](y)", "reference_images": "<i>", "made": made}
    text = a_card(evaluations=[report], samples=made_with(made))
    assert "<b>" not in text and "<i>" not in text and "[x](y)" not in text and text.count(r"\<b\> steps of a") == 2


def test_numbers_that_cannot_be_are_unknown():
    """Of a damaged run.json, data.json or evaluate.json: 400 digits, and what json calls Infinity and NaN."""
    huge = 10**400 - 1
    stage = {"stage": "vanilla", "steps": huge, "seconds": float("inf"), "tflops": float("nan")}
    compute = {"stages": [stage], "total_tflops": huge, "total_seconds": 2.5}
    report = {"metric": "fid", "fid": huge, "recall": 0.5, "recall_std": huge, "made": {}}
    text = a_card(data={"count": huge}, compute=compute, evaluations=[report | {"num_images": huge}])
    assert "| vanilla | unknown | unknown | unknown |" in text and "unknown TFLOPs, 2.5 s" in text
    assert "| recall | 0.5 |" in text and "9" * 30 not in text and "inf" not in text and "nan" not in text


def test_numbers_are_shown_with_what_they_depend_on():
    made = {"steps": 25, "sampler": "heun", "guidance_scale": 1.5, "guidance_interval": [0.0, 0.6], "seed": 7}
    report = {
        "metric": "fid", "label": "FID", "fid": 12.345678, "recall": 0.5, "num_images": 5000, "reference": "/data/real",
        "reference_images": 6000, "extractor": "inception", "extractor_sha256": "ab" * 32, "made": made | {"precision": "fp32"},
    }  # fmt: skip
    text = a_card(evaluations=[report])
    assert "| FID | 12.35 |" in text and "| recall | 0.5 |" in text
    for said in ("5,000 samples against real (6,000 images)", "sha256 abababababab", "25 steps of heun, guidance 1.5",
                 "seed 7", "fp32"):  # fmt: skip
        assert said in text
    weak = {"stage": "stage1", "step": 400, "weights": "ema", "source": {"path": "/home/me/runs/a"}}
    rest = {"autoguidance": weak, "guidance_channels": 3, "time_shift": 3.0, "early_guidance": 1.4}
    rest |= {"early_interval": [0.0, 0.5], "decode_with": "/home/me/vae", "rounding": "down"}
    text = a_card(evaluations=[report | {"made": made | rest}]).replace("\\", "")
    for said in ("guided by a weaker model (stage1, step 400, ema)", "guided channels 3", "time shift 3.0",
                 "early guidance 1.4", "early guidance for t in", "decoded with vae", "pixels rounded down"):  # fmt: skip
        assert said in text, said
    assert "/home/me" not in text
    stages = [{"stage": "vanilla", "steps": 2, "seconds": 3.25, "tflops": 0.0125}]
    total = {"stages": stages, "total_tflops": None, "total_seconds": None, "student_tflops": 0.0125}
    text = a_card(compute=total)
    assert "| vanilla | 2 | 3.25 | 0.0125 |" in text and "teachers included: unknown TFLOPs" in text
