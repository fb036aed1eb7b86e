"""Sounds, spectrograms, videos and pictures that are not square: files ⇒ both stages ⇒ previews, samples and measurements."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from selftrans.cli.main import main
from selftrans.data.dataset import Dataset
from selftrans.experiments.comparison.comparison_settings import check_measuring
from selftrans.experiments.comparison.measurement import Measurement, measure_checkpoint
from selftrans.train.run import train
from tests.support import toy
from tests.support.clips import moving, save_gif, sounds
from tests.support.pictures import encoded, write
from tests.support.toy import override, quick  # noqa: F401 - a fixture

#: another family starts from its published size: toy sizes follow its name
LIGHTNING = {"model.name": "LightningDiT-B/1", "model.width": 32, "model.depth": 3, "model.heads": 2, "model.patch": 8}
#: kind -> options of `prepare`, settings of the model, shape of a latent, suffixes of the sample files, least size of a preview
KINDS = {
    "waveform": (["--length", "0.008"], LIGHTNING, (1, 64), [".npy", ".wav"], (2 * 98 + 2, 2 * 162 + 2)),
    "mel": (
        ["--audio", "mel", "--length", "0.096", "--bins", "8", "--hop", "64"],
        {},
        (1, 8, 12),
        [".npy", ".wav"],
        (2 * (8 * 8 + 2) + 2, 2 * (12 * 8 + 2) + 2),
    ),
    "video": (
        ["--frames", "4", "--grey", "--resolution", "8"],
        {},
        (1, 4, 8, 8),
        [".gif", ".npy"],
        (2 * (8 * 8 + 2) + 2, 2 * (4 * 8 * 8 + 2) + 2),
    ),
    "pictures": (["--resolution", "8x12"], {}, (3, 8, 12), [".png"], (2 * (8 * 8 + 2) + 2, 2 * (12 * 8 + 2) + 2)),
}


def source(root: Path, kind: str) -> Path:
    """Class folders with 20 files."""
    if kind in ("waveform", "mel"):
        return sounds(root, 20, 0.1)
    for i in range(20):
        if kind == "video":
            save_gif(root / "ab"[i % 2] / f"{i}.gif", moving(i))
        else:
            array = np.random.default_rng(i).integers(0, 256, (20, 30, 3), dtype=np.uint8)
            write(root, {f"{'ab'[i % 2]}/{i}.png": encoded(array)})
    return root


#: recipes made for such data; the others are trained as digits are
RECIPES = {"mel": "speech_words", "video": "moving_digits"}


@pytest.mark.parametrize("kind", KINDS)
def test_files_become_samples(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags, model, shape, suffixes, sheet = KINDS[kind]
    data, out, made = (str(tmp_path / name) for name in ("data", "run", "made"))
    assert main(["prepare", str(source(tmp_path / "x", kind)), "--out", data, *flags]) == 0
    assert Dataset.open(data).manifest.shape == shape
    config = override(toy.toy({"data.path": data, "train.preview_every": 8}, name=RECIPES.get(kind, "digits")), model)
    train(config, Path(out), quiet=True)
    for stage in ("stage1", "stage2"):
        (preview,) = Path(out, stage, "previews").iterdir()
        picture = np.asarray(Image.open(preview))  # labels are written below the samples
        assert all(side >= least for side, least in zip(picture.shape[:2], sheet, strict=True)), picture.shape
    assert main(["sample", out, "--out", made, "--num=6", "--steps=2", "--sampler=heun"]) == 0
    assert sorted({path.suffix for path in Path(made).glob("[0-9]*")}) == suffixes
    assert len(list(Path(made).glob("[0-9]*"))) == 6 * len(suffixes)
    with np.load(Path(made, "samples.npz")) as arrays:
        samples = arrays["arr_0"]
    assert samples.shape == (6, 8, 12, 3) if kind == "pictures" else (6, *shape)
    report = tmp_path / "report.json"
    argv = ["evaluate", made, "--reference", data, "--features", "values", "--out", str(report)]
    assert main(argv) == 0
    assert json.loads(report.read_text())["frechet_distance"] > 0
    argv = ["analyse", out, "--out", str(tmp_path / "analysed"), "--samples=20", "--timesteps", "0.4"]
    assert kind != "video" or main(argv) == 0
    classifier = str(tmp_path / "c.safetensors")
    assert main(["classifier", data, "--out", classifier, "--epochs", "1"]) == 0
    check_measuring(config, classifier, None)
    measurement = Measurement.of(config, classifier, weights=None, images=6, block=2)
    point = measure_checkpoint(toy.checkpoint(Path(out), "stage2"), measurement)
    assert point["metric"] == "Fréchet distance (c classifier features)" and 0 <= point["accuracy"] <= 1


def test_decoded_samples_have_the_range_of_the_files(tmp_path: Path) -> None:
    """What the model samples is normalised; what is written is not."""
    data = str(tmp_path / "data")
    root = source(tmp_path / "x", "mel")
    assert main(["prepare", str(root), "--out", data, *KINDS["mel"][0]]) == 0
    config = override(toy.toy({"data.path": data, "method": "vanilla", "train.steps": 2}), {"model.patch": 2})
    train(config, tmp_path / "run", quiet=True)
    argv = ["sample", str(tmp_path / "run"), "--out", str(tmp_path / "made"), "--num=20", "--steps=2", "--sampler=heun"]
    assert main(argv) == 0
    space = Dataset.open(data).manifest.latent_space
    with np.load(tmp_path / "made" / "samples.npz") as arrays:
        normalised = (arrays["arr_0"] - space.shift) * space.scale
    assert (
        abs(normalised.mean()) < 0.3 and 0.5 < normalised.std() < 2
    )  # the noise, after two steps of an untrained model
