"""`prepare` with captions: what is stored equals what the encoder gives; resume, refusals, sizes, damage; reading it."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch

from selftrans.data import encode_captions
from selftrans.data.dataset import Dataset
from selftrans.data.encode_captions import TextOptions
from selftrans.data.manifest import Manifest
from selftrans.data.on_device import OnDevice
from selftrans.data.prepare import prepare
from selftrans.data.prepare_features import prepare_features
from selftrans.encoders.text import load_text_encoder
from selftrans.types import MASK, TEXT
from tests.support import captioned
from tests.support.pictures import contents, encoded, noise, stopped_after, write
from tests.support.vision import save_encoder as save_vision


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return captioned.save_text_encoder(tmp_path_factory.mktemp("text") / "encoder")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 pictures, the even ones with three captions, the odd ones with one."""
    return captioned.pictures(tmp_path_factory.mktemp("pictures") / "x", 23)


def run(pictures: Path, out: Path, encoder: str, *, text: dict[str, Any] | None = None, **options: Any) -> Manifest:
    chosen = {"shard_size": 10, "batch_size": 4, "progress": False} | options
    return prepare(pictures, out, text=TextOptions(encoder, **(text or {})), **chosen)


@pytest.mark.parametrize("store", ["tokens", "ids"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("on_device", [False, True])
def test_reading_gives_the_tokens_of_the_encoder(
    pictures: Path, encoder: str, tmp_path: Path, store: str, dtype: str, on_device: bool
) -> None:
    manifest = run(pictures, tmp_path / "out", encoder, text={"store": store, "dtype": dtype})
    model = load_text_encoder(encoder)
    assert manifest.conditions == model.conditions() and manifest.classes == () and manifest.count == 23
    dataset = Dataset.open(tmp_path / "out", verify=True)
    dataset = OnDevice(dataset, "cpu") if on_device else dataset
    rows, which = np.array([22, 3, 4, 4, 0]), np.array([2, 0, 1, 0, 2])
    texts = [captioned.sentences(row)[k] for row, k in zip(rows, which, strict=True)]
    assert dataset.captions(rows) == [captioned.sentences(row) for row in rows]
    expected: Any = model.encode(texts)
    for found in (
        dataset.text(rows, which),
        dataset.condition(dataset.read(rows, which=which)),
        dataset.condition(dataset.read(rows, which=which), "cpu"),
    ):
        assert isinstance(found, dict) and found[TEXT].dtype == torch.float32
        stored = expected[TEXT].to(getattr(torch, dtype)).float() if store == "tokens" else expected[TEXT]
        torch.testing.assert_close(found[TEXT], stored, rtol=0, atol=1e-6)  # rounding differs between batches
        assert torch.equal(found[MASK], expected[MASK]) and found[MASK].dtype == torch.bool
    first: Any = dataset.text(torch.tensor([4, 3]))
    torch.testing.assert_close(first[TEXT], (dataset.text(np.array([4, 3]), np.array([0, 0])))[TEXT])  # type: ignore[index]
    null, empty = dataset.null(), model.encode([""])
    assert isinstance(null, dict) and isinstance(empty, dict) and torch.equal(null[MASK], empty[MASK])
    assert torch.equal(null[TEXT], empty[TEXT].to(getattr(torch, dtype)).float()) and null[TEXT].shape == (1, 12, 16)


def test_files_are_as_described(pictures: Path, encoder: str, tmp_path: Path) -> None:
    """Read by the safetensors library alone."""
    manifest = run(pictures, tmp_path / "a", encoder, text={"dtype": "bfloat16"})
    run(pictures, tmp_path / "b", encoder, text={"store": "ids", "most": 2})
    one, null = load_torch(tmp_path / "a" / "shard-00002.safetensors"), load_torch(tmp_path / "a" / "null.safetensors")
    assert {name: (x.dtype, tuple(x.shape)) for name, x in one.items()} == {
        "moments": (torch.float16, (3, 1, 3, 8, 8)),
        "labels": (torch.int64, (3,)),
        "text": (torch.bfloat16, (3, 3, 12, 16)),
        "mask": (torch.uint8, (3, 3, 12)),
        "captions": (torch.int32, (3,)),
        "caption": (torch.uint8, (3, 3, 34)),
    }
    assert {name: (x.dtype, tuple(x.shape)) for name, x in null.items()} == {
        "text": (torch.bfloat16, (1, 12, 16)),
        "mask": (torch.uint8, (1, 12)),
    }
    assert one["captions"].tolist() == [3, 1, 3] and not one["text"][1, 1:].any() and not one["mask"][1, 1:].any()
    assert bytes(one["caption"][1, 0].numpy()).rstrip(b"\0").decode() == captioned.sentences(21)[0]
    ids = load_file(tmp_path / "b" / "shard-00002.safetensors")
    assert "text" not in ids and ids["ids"].dtype == np.int32 and ids["ids"].shape == (3, 2, 12)
    assert ids["captions"].tolist() == [2, 1, 2]
    assert [captioned.WORDS[i] for i in ids["ids"][0, 1][:6]] == ["[BOS]", "the", "square", "is", "red", "[EOS]"]
    assert manifest.text is not None and manifest.text.caption_bytes(manifest.conditions) == 12 * 16 * 2 + 12 + 34 + 1
    summary = manifest.summary()
    assert "23 pictures of 8x8, with captions" in summary and "at most 3 captions each, text of 12x16 by" in summary


def test_only_the_chosen_caption_is_read(pictures: Path, encoder: str, tmp_path: Path) -> None:
    run(pictures, tmp_path / "out", encoder)
    file = tmp_path / "out" / "shard-00000.safetensors"
    tensors = load_file(file)
    tensors["text"][4, [0, 2]] = np.nan
    save_file(tensors, file)
    dataset = Dataset.open(tmp_path / "out")
    dataset.read(np.array([4]), which=np.array([1]))
    for which in (0, 2):
        with pytest.raises(
            ValueError, match=r"shard-00000.safetensors holds NaN or infinite text for picture 4 \(row 4"
        ):
            dataset.read(np.array([3, 4]), which=np.array([0, which]))
    for which in (-1, 1):
        with pytest.raises(ValueError, match=r"a number in `which`, from 0, is none of the captions of its picture in"):
            dataset.read(np.array([4, 3]), which=np.array([0, which]))


def test_prompts_are_fixed(pictures: Path, encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(pictures, tmp_path / "out", encoder)
    dataset = Dataset.open(tmp_path / "out")
    assert sorted(dataset.prompts) == sorted({captioned.sentences(i)[0] for i in range(23)})
    assert dataset.prompts == Dataset.open(tmp_path / "out").prompts == OnDevice(dataset, "cpu").prompts
    assert copy.deepcopy(dataset).prompts == dataset.prompts
    monkeypatch.setattr("selftrans.data.dataset.PROMPTS", 3)
    assert len(Dataset.open(tmp_path / "out").prompts) == 3


def test_data_without_captions_have_none(tmp_path: Path) -> None:
    manifest = prepare("digits", tmp_path / "out", progress=False)
    dataset = Dataset.open(tmp_path / "out")
    assert dataset.prompts == () and dataset.null() is None and dataset.captions(np.arange(2)) == [[], []]
    assert dataset.counts is None and "text" not in json.loads(manifest.to_json())
    with pytest.raises(ValueError, match="has 10 classes, not captions"):
        dataset.text(np.arange(2))


def test_interrupted_and_repeated_preparations_are_bit_identical(pictures: Path, encoder: str, tmp_path: Path) -> None:
    run(pictures, tmp_path / "complete", encoder)
    out = tmp_path / "parts"
    for count in (3, 13):
        with stopped_after(count):
            run(pictures, out, encoder)
    assert not (out / "manifest.json").exists() and (out / "null.safetensors").exists()
    run(pictures, out, encoder)
    assert contents(out) == contents(tmp_path / "complete")
    run(pictures, out, encoder)
    assert contents(out) == contents(tmp_path / "complete")
    for part in ("2/2", "1/2"):
        run(pictures, tmp_path / "two", encoder, part=part)
    assert contents(tmp_path / "two") == contents(tmp_path / "complete")


def test_damaged_and_lost_empty_captions_are_made_again(pictures: Path, encoder: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(pictures, out, encoder)
    complete, null = contents(out), out / "null.safetensors"
    changed = complete["null.safetensors"][:-1] + b"\x01"
    for damage in (lambda: null.write_bytes(changed), lambda: null.write_bytes(b"x"), null.unlink):
        damage()
        with pytest.raises(
            ValueError, match=r"null.safetensors (fails its sha256; delete the file and|is missing;) repeat"
        ):
            Dataset.open(out, verify=True)
        run(pictures, out, encoder)
        assert contents(out) == complete
    null.unlink()
    with pytest.raises(ValueError, match=r"null.safetensors is missing; repeat the `selftrans prepare`"):
        Dataset.open(out).null()


@pytest.mark.parametrize("finished", [True, False])
def test_other_encoders_and_options_are_refused_by_name(
    pictures: Path, encoder: str, tmp_path: Path, finished: bool
) -> None:
    out = tmp_path / "out"
    if finished:
        run(pictures, out, encoder)
    else:
        with stopped_after(13):
            run(pictures, out, encoder)
    before = contents(out)
    other = captioned.save_text_encoder(tmp_path / "bert", "bert")
    for text, message in (
        ({"encoder": other}, f"with text {encoder}, not {other}"),
        ({"tokens": 9}, "without text_tokens, not with 9"),
        ({"dtype": "bfloat16"}, "with text_dtype float16, not bfloat16"),
        ({"store": "ids"}, "with text_store tokens, not ids"),
        ({"most": 1}, "with captions_per_picture 5, not 1"),
    ):
        with pytest.raises(
            ValueError, match=f"was prepared {message}; repeat the command as it was, or choose another"
        ):
            prepare(pictures, out, text=TextOptions(**({"encoder": encoder} | text)), shard_size=10, progress=False)
    with pytest.raises(ValueError, match=r"was prepared with text .*, not without"):
        prepare(pictures, out, shard_size=10, progress=False)
    assert contents(out) == before


def test_changed_encoders_under_the_same_name_are_refused(pictures: Path, tmp_path: Path) -> None:
    name, out = captioned.save_text_encoder(tmp_path / "encoder"), tmp_path / "out"
    with stopped_after(13):
        run(pictures, out, name)
    captioned.save_text_encoder(tmp_path / "encoder", seed=1)
    message = rf"begun with conditions text of 12x16 by {name} with sha256 \w+, now it is text of 12x16 by .*\w; choose"
    with pytest.raises(ValueError, match=message):
        run(pictures, out, name)
    shutil.rmtree(tmp_path / "encoder")
    captioned.save_text_encoder(tmp_path / "encoder", "bert")
    with pytest.raises(ValueError, match=f"begun with conditions text of 12x16 by {name}, now it is text of 20x16 by"):
        run(pictures, out, name)


def test_ids_are_not_encoded_by_another_encoder(pictures: Path, tmp_path: Path) -> None:
    name, out = captioned.save_text_encoder(tmp_path / "encoder"), tmp_path / "out"
    run(pictures, out, name, text={"store": "ids"})
    captioned.save_text_encoder(tmp_path / "encoder", seed=1)
    with pytest.raises(
        ValueError, match=r"encoder is not the text encoder that prepared the data \(sha256 \w{12}, not \w{12}\); give"
    ):
        Dataset.open(out).text(np.arange(2))
    elsewhere = captioned.save_text_encoder(tmp_path / "elsewhere")
    dataset = Dataset.open(out, text_encoder=elsewhere)
    again = pickle.loads(pickle.dumps(dataset))  # as a worker process gets it
    assert torch.equal(dataset.text(np.arange(2))["text"], again.text(np.arange(2))["text"])  # type: ignore[index]


def test_what_lacks_a_half_stops_before_encoding_or_is_listed(
    encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = captioned.pictures(tmp_path / "x", 6)
    write(where, {"001.txt": b" \n", "orphan.txt": b"a"})
    (where / "004.txt").unlink()
    monkeypatch.setattr("selftrans.data.prepare.load_text_encoder", None)  # must not be called
    message = r"3 samples of .*x cannot be used; the first: 001.png \(its captions are empty\); repair them, or leave"
    with pytest.raises(ValueError, match=message):
        run(where, tmp_path / "out", encoder)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    manifest = run(where, tmp_path / "out", encoder, skip_bad=True)
    assert manifest.count == 4 and manifest.skipped == (
        ("001.png", "its captions are empty"),
        ("004.png", "a picture without a caption"),
        ("orphan.txt", "a caption without its picture"),
    )
    assert "3 unusable pictures left out:\n  001.png: its captions are empty" in manifest.summary()
    dataset = Dataset.open(tmp_path / "out")
    assert dataset.captions(np.arange(4)) == [captioned.sentences(i) for i in (0, 2, 3, 5)]


def test_long_captions_are_counted_and_truncated(encoder: str, tmp_path: Path) -> None:
    where = captioned.pictures(tmp_path / "x", 6)
    long = "a red square " * 400
    write(where, {"001.txt": long.encode(), "003.txt": b"red " * 11, "005.txt": b"red " * 10})
    with pytest.warns(UserWarning, match="^2 of 12 captions are longer than 12 tokens; the rest is cut off$"):
        run(where, tmp_path / "out", encoder)
    dataset, model = Dataset.open(tmp_path / "out"), load_text_encoder(encoder)
    [[kept]] = dataset.captions(np.array([1]))
    assert len(kept) == 4096 and long.startswith(kept)
    found: Any = dataset.text(np.array([1]))
    expected: Any = model.encode([long])
    torch.testing.assert_close(found[TEXT], expected[TEXT].half().float(), rtol=0, atol=1e-6)


def test_captions_are_cut_between_characters(encoder: str, tmp_path: Path) -> None:
    where = write(tmp_path / "x", {"a.png": encoded(noise(8)), "a.txt": ("x" + "猫" * 2000).encode()})
    run(where, tmp_path / "out", encoder)
    assert Dataset.open(tmp_path / "out").captions(np.array([0])) == [["x" + "猫" * 1365]]


def test_sizes_are_said_before_encoding(
    pictures: Path, encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(encode_captions.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(
        ValueError, match=r"out needs [\d.]+ kB, its disk has 1 kB free; .*--text-store ids.* another --out"
    ):
        run(pictures, tmp_path / "out", encoder, progress=True, text={"most": 2})
    said = capsys.readouterr().err
    longest = max(len(text) for row in range(23) for text in captioned.sentences(row)[:2])
    each = 12 * 16 * 2 + 12 + longest + 2  # tokens, mask, the caption, half of the number of captions
    assert (
        "35 captions of 23 pictures, at most 2 each (12 more left out: --captions-per-picture); their tokens " in said
    )
    assert (
        f"(12x16 float16) take {each / 1e3:.1f} kB a caption, {each * 46 / 1e3:.3g} kB in all; with --text-store ids 0.1 kB"
        in said
    )
    assert not list((tmp_path / "out").glob("*.safetensors"))
    monkeypatch.undo()
    run(pictures, tmp_path / "out", encoder, progress=True, text={"store": "ids"})
    assert "; their ids take 0.1 kB a caption" in capsys.readouterr().err


def test_tokens_beyond_float16_name_the_remedy(pictures: Path, tmp_path: Path) -> None:
    name = captioned.save_text_encoder(tmp_path / "encoder")
    weights = load_file(tmp_path / "encoder" / "model.safetensors")
    last = next(key for key in weights if key.endswith("final_layer_norm.weight"))
    save_file(weights | {last: weights[last] * 1e6}, tmp_path / "encoder" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="are too large for float16; try --text-dtype bfloat16"):
        run(pictures, tmp_path / "out", name)
    run(pictures, tmp_path / "other", name, text={"dtype": "bfloat16"})
    assert Dataset.open(tmp_path / "other").text(np.arange(23))[TEXT].abs().max() > 65504  # type: ignore[index]


@pytest.mark.parametrize(("option", "value"), [("dtype", "float32"), ("store", "x"), ("most", 0), ("most", 5000)])
def test_options_out_of_range_are_refused(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{value}"):
        TextOptions("minilm", **{option: value})


def test_captions_belong_to_pictures(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", data=np.zeros((3, 1, 4), np.float32))
    with pytest.raises(ValueError, match="--text is for pictures; leave it out with --autoencoder values"):
        prepare(tmp_path / "x.npz", tmp_path / "out", autoencoder="values", text="minilm", progress=False)


@pytest.mark.filterwarnings("ignore:features of encoder")
def test_features_of_pictures_with_captions(pictures: Path, encoder: str, tmp_path: Path) -> None:
    """The second half of `prepare` opens the same source, so that it knows the same pictures."""
    run(pictures, tmp_path / "out", encoder, flip=True)
    vision = save_vision(tmp_path / "vision")
    made = prepare_features(pictures, tmp_path / "out", vision, progress=False)
    assert made.grid == 4 and len(made.files) == 3
    dataset = Dataset.open(tmp_path / "out", verify=True)
    dataset.open_features()
    tensors = dataset.read(np.array([22, 1]))
    assert set(tensors) == {"moments", "labels", "text", "mask", "features"} and tensors["moments"].shape[1] == 2
