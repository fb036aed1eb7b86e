"""`selftrans evaluate`: runs sampled in memory, cached references, ADM's files, the table."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from selftrans.cli.main import main
from selftrans.data.dataset import Dataset
from selftrans.data.decoded import decoded_images
from selftrans.data.prepare import prepare
from selftrans.evaluate.classifier import SmallClassifier
from selftrans.evaluate.extractors import ClassifierExtractor, ValuesExtractor
from selftrans.evaluate.metrics import frechet_distance
from selftrans.evaluate.statistics import Statistics
from selftrans.experiments import evaluate_samples as scores
from selftrans.experiments import reference
from selftrans.experiments.comparison.comparison_settings import override, shared_settings
from selftrans.experiments.comparison.measurement import Measurement, measure_checkpoint, samples_of
from selftrans.sampling.images import Sampler
from selftrans.train.run import train
from tests.support import toy
from tests.support.toy import quick  # noqa: F401 - a fixture


@pytest.fixture
def scorer(tmp_path: Path) -> Path:
    """A classifier of 8x8 grey pictures with random weights."""
    SmallClassifier(8, 1, 10).save(tmp_path / "scorer.safetensors")
    return tmp_path / "scorer.safetensors"


def extractor(scorer: Path) -> ClassifierExtractor:
    return ClassifierExtractor(SmallClassifier.load(scorer), "scorer classifier")


def folder(path: Path, count: int = 24, seed: int = 0) -> Path:
    path.mkdir()
    for k in range(count):
        array = np.random.default_rng(1000 * seed + k).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(array).save(path / f"{k}.png")
    return path


def test_report_of_a_run_equals_report_of_its_samples_on_disk(scorer: Path, tmp_path: Path, capsys) -> None:
    run = toy.copy(toy.finished(), tmp_path / "run")
    settings = ["--num=30", "--steps=2", "--sampler=heun", "--guidance-scale=1.5", "--guidance-interval", "0.1", "0.8"]
    rest = ["--reference=digits", f"--features={scorer}"]
    assert main(["evaluate", str(run), *settings, *rest, "--out", str(tmp_path / "a.json")]) == 0
    output = capsys.readouterr().out
    assert main(["sample", str(run), "--out", str(tmp_path / "samples"), *settings]) == 0
    before = toy.tree(run)
    assert main(["evaluate", str(tmp_path / "samples"), *rest]) == 0
    direct = json.loads((tmp_path / "a.json").read_text())
    stored = json.loads((tmp_path / "samples" / "evaluate.json").read_text())
    for name in ("frechet_distance", "accuracy", "precision", "label_balance", "extractor_sha256", "num_images"):
        assert direct[name] == stored[name], name
    assert {name: direct["made"][name] for name in scores.SETTINGS} == {
        **{name: stored["made"][name] for name in scores.SETTINGS},
    }
    assert direct["made"]["guidance_scale"] == 1.5 and direct["made"]["weights"] == "ema"
    for text in (
        "sampler heun",
        "steps 2",
        "guidance scale 1.5",
        "guidance interval [0.1, 0.8]",
        "weights ema",
        "seed 0",
    ):
        assert text in output, text
    computed = (
        "score over 10 splits, precision and recall with 3 neighbours, kernel distance over 100 subsets of 30 images"
    )
    assert computed in output
    assert "autoencoder pixel" in output and "FID" not in output and toy.tree(run) == before


def test_report_is_written_to_the_run_and_raw_weights_differ(scorer: Path, tmp_path: Path) -> None:
    run = toy.copy(toy.finished(), tmp_path / "run")
    argv = ["evaluate", str(run), "--num=20", "--steps=1", "--reference=digits", f"--features={scorer}"]
    assert main(argv) == 0
    first = json.loads((run / "evaluate.json").read_text())
    assert main([*argv, "--weights=raw", "--stage=stage1"]) == 0
    second = json.loads((run / "evaluate.json").read_text())
    assert second["made"]["weights"] == "raw" and second["made"]["stage"] == "stage1"
    assert first["frechet_distance"] != second["frechet_distance"]


def test_sampling_options_warn_for_stored_images(scorer: Path, tmp_path: Path) -> None:
    pictures = folder(tmp_path / "pictures")
    with pytest.warns(UserWarning, match=r"--steps is ignored: .* holds images"):
        scores.evaluate_samples(pictures, pictures, str(scorer), settings={"steps": 3})


def test_npz_of_a_sample_folder_uses_its_samples_json(scorer: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    assert main(["sample", str(toy.finished()), "--out", str(made), "--num", "12", "--steps", "2"]) == 0
    complete, npz = (scores.evaluate_samples(path, "digits", str(scorer)) for path in (made, made / "samples.npz"))
    assert npz["made"]["sampler"] == "heun" and npz | {"samples": 0} == complete | {"samples": 0}


def test_labels_in_an_npz_of_pictures_are_read(scorer: Path, tmp_path: Path) -> None:
    """An npz of `selftrans sample` outside its folder, and any npz in ADM's layout."""
    made, moved = tmp_path / "made", tmp_path / "moved.npz"
    assert main(["sample", str(toy.finished()), "--out", str(made), "--num", "20", "--steps", "1"]) == 0
    complete = scores.evaluate_samples(made, "digits", str(scorer))
    (made / "samples.npz").rename(moved)
    alone = scores.evaluate_samples(moved, "digits", str(scorer))
    assert alone["label_balance"] == complete["label_balance"] == {"classes": 10, "fewest": 2, "most": 2}
    assert alone["accuracy"] == complete["accuracy"] and alone["made"]["sampler"] is None
    assert ", 2 images of each of 10 classes" in scores.text(alone)
    images = np.zeros((4, 8, 8, 1), np.uint8)
    for other in (np.zeros(4), np.zeros(4, np.int64), np.zeros((4, 10), np.int64)):  # neither labels nor classes
        np.savez(moved, images, other)
        assert scores.open_samples(moved, {}).labels is None
    np.savez(moved, images)
    unknown = scores.evaluate_samples(moved, "digits", str(scorer))
    assert unknown["label_balance"] is None and "settings and labels are unknown" in scores.text(unknown)
    assert "balance" not in scores.text(unknown | {"made": unknown["made"] | {"num_classes": 1}})


def test_labels_that_do_not_match_the_pictures_are_refused(tmp_path: Path) -> None:
    images = np.zeros((4, 8, 8, 1), np.uint8)
    np.savez_compressed(tmp_path / "x.npz", images, np.ones(1 << 22, np.int64))  # would expand
    with pytest.raises(ValueError, match=r"x.npz holds labels arr_1 that do not fit .*: 4194304 labels of 4 images"):
        scores.open_samples(tmp_path / "x.npz", {})
    np.savez(tmp_path / "y.npz", images.astype(float), np.ones(4, np.int64))
    with pytest.raises(ValueError, match=r"y.npz holds no uint8 array arr_0 of images .* it is float64"):
        next(scores.open_samples(tmp_path / "y.npz", {}).images)


def test_checkpoint_of_other_code_names_selftrans_import(scorer: Path, tmp_path: Path, capsys) -> None:
    assert main(["evaluate", str(tmp_path / "SiT.pt"), "--reference", "digits", "--features", str(scorer)]) == 1
    assert "SiT.pt is a checkpoint of another code base; convert it with `selftrans import`" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["pictrues/made", "nowhere", "made.npz"])
def test_missing_samples_and_references_are_not_searched_on_the_hub(
    scorer: Path, tmp_path: Path, capsys, monkeypatch, given: str
) -> None:
    monkeypatch.setattr("selftrans.data.sources.table.hub", lambda *args: pytest.fail("asked the hub"))
    assert main(["evaluate", given, "--reference", "digits", "--features", str(scorer)]) == 1
    output = capsys.readouterr().err
    assert (
        f"{given} does not exist; give a folder, zip or npz of pictures, or a run" in output and output.count("\n") == 1
    )
    made = folder(tmp_path / "made")
    assert main(["evaluate", str(made), "--reference", given, "--features", str(scorer)]) == 1
    assert f"{given} does not exist; {reference.WANTED}" in capsys.readouterr().err


# ---- references


def test_labels_that_expand_beyond_the_file_are_refused(scorer: Path, tmp_path: Path, capsys) -> None:
    made = tmp_path / "made"
    made.mkdir()
    images = np.zeros((2, 8, 8, 1), np.uint8)
    (made / "samples.json").write_text(json.dumps({"num": 2, "complete": True, "settings": {"num_classes": 10}}))
    np.savez_compressed(made / "samples.npz", arr_0=images, arr_1=np.zeros(1 << 22, np.int64))  # 32 MB in 33 kB
    assert main(["evaluate", str(made), "--reference", "digits", "--features", str(scorer)]) == 1
    output = capsys.readouterr().err
    assert (
        "made is damaged (its labels claim more bytes than the file has); delete it" in output
        and output.count("\n") == 1
    )


def test_reference_is_saved_with_adm_names(scorer: Path, tmp_path: Path) -> None:
    real, made = folder(tmp_path / "real"), folder(tmp_path / "made", seed=1)
    argv = ["evaluate", str(made), f"--features={scorer}"]
    assert main([*argv, f"--reference={real}", f"--save-reference={tmp_path / 'ref.npz'}"]) == 0
    first = json.loads((made / "evaluate.json").read_text())
    with np.load(tmp_path / "ref.npz") as arrays:
        assert {"mu", "sigma"} <= set(arrays.files)
    assert main([*argv, f"--reference={tmp_path / 'ref.npz'}"]) == 0
    second = json.loads((made / "evaluate.json").read_text())
    assert second["frechet_distance"] == pytest.approx(first["frechet_distance"], rel=1e-9)
    assert second["precision"] == first["precision"]


def test_adm_reference_batch_uses_its_statistics_and_its_pictures(scorer: Path, tmp_path: Path, monkeypatch) -> None:
    """mu and sigma are of more pictures than arr_0 holds, so both must be used."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    one, rng = extractor(scorer), np.random.default_rng(3)
    pictures = rng.integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    everything = Statistics.of(rng.integers(0, 256, (200, 8, 8, 1), dtype=np.uint8), one)
    np.savez(tmp_path / "batch.npz", arr_0=pictures, mu=everything.mean, sigma=everything.cov)
    found = reference.reference_of(tmp_path / "batch.npz", one)
    assert np.array_equal(found.mean, everything.mean) and found.features.shape == (40, one.dim)
    assert found.count is None, "the file does not record the number of pictures of mu and sigma"
    found.save(tmp_path / "again.npz")
    assert np.array_equal(Statistics.load(tmp_path / "again.npz").features, found.features)
    assert np.array_equal(found.features, Statistics.of(pictures, one).features)
    made = folder(tmp_path / "made")
    report = scores.evaluate_samples(made, tmp_path / "batch.npz", str(scorer))
    expected = frechet_distance(
        Statistics.of(reference.iter_images(made), one), dataclasses.replace(everything, count=None)
    )
    assert report["frechet_distance"] == pytest.approx(expected, rel=1e-9)
    assert 0 <= report["recall"] <= 1 and "does not name its extractor" in report["note"]
    assert report["reference_images"] is None and (
        "precision, recall, authenticity and kernel distance use the 40 pictures stored with" in report["note"]
    )


def test_spatial_distance_from_spatial_statistics(tmp_path: Path) -> None:
    """sFID is the same formula for spatial features, also from a file with mu_s and sigma_s."""

    class Spatial:
        name, sha256, dim, pictures = "spatial", "0" * 64, 3, True

        def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
            flat = images.reshape(len(images), -1).astype(np.float32)
            return {"features": flat[:, :3], "spatial": flat[:, 3:8]}

    rng = np.random.default_rng(0)
    real, made = (rng.integers(low, 256, (60, 4, 4, 1), dtype=np.uint8) for low in (0, 40))
    statistics = Statistics.of(real, Spatial())
    statistics.save(tmp_path / "ref.npz")
    with np.load(tmp_path / "ref.npz") as arrays:
        assert {"mu_s", "sigma_s"} <= set(arrays.files)
        spatial = arrays["mu_s"], arrays["sigma_s"]
    flat = made.reshape(60, -1).astype(float)[:, 3:8]
    report = scores.evaluate(made, Statistics.load(tmp_path / "ref.npz"), Spatial(), metrics=("frechet",))
    by_hand = frechet_distance(
        Statistics(flat.mean(axis=0), np.cov(flat, rowvar=False)), Statistics(spatial[0], spatial[1])
    )
    assert report["spatial_frechet_distance"] == pytest.approx(by_hand, rel=1e-6)


# ---- data that are not pictures


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `values.npz`, its prepared data `data`, and a short `run` on them."""
    place = tmp_path_factory.mktemp("values")
    rng = np.random.default_rng(0)
    np.savez(place / "values.npz", data=rng.normal(3, 2, (200, 2, 8, 8)).astype(np.float32), labels=np.arange(200) % 4)
    prepare(place / "values.npz", place / "data", autoencoder="values", progress=False)
    small = {"method": "vanilla", "train.steps": 2, "data.path": str(place / "data"), "train.preview_every": 2}
    train(toy.toy(small), place / "run", quiet=True)
    return place


def test_values_are_sampled_to_npy_files_and_evaluated(values: Path, tmp_path: Path, capsys) -> None:
    made, settings = tmp_path / "made", ["--num=150", "--steps=2", "--sampler=heun"]
    assert main(["sample", str(values / "run"), "--out", str(made), *settings]) == 0
    assert f"150 samples -> {made} (.npy files, samples.npz, samples.json)" in capsys.readouterr().out
    with np.load(made / "samples.npz") as arrays:
        samples, labels = arrays["arr_0"], arrays["arr_1"]
    assert (
        samples.shape == (150, 2, 8, 8)
        and samples.dtype == np.float32
        and labels.tolist() == [k % 4 for k in range(150)]
    )
    assert np.array_equal(np.load(made / "000007.npy"), samples[7])
    assert np.abs(samples).max() > 1, "values are not clamped"
    reports = []
    for given in (values / "run", made, made / "samples.npz"):
        out = tmp_path / "report.json"
        argv = ["evaluate", str(given), "--reference", str(values / "data"), "--features", "values", "--out", str(out)]
        assert main([*argv, *(settings if given == values / "run" else ())]) == 0
        reports.append(json.loads(out.read_text()))
    with np.load(values / "values.npz") as arrays:
        real = arrays["data"].reshape(200, -1).astype(float)
    flat = samples.reshape(150, -1).astype(float)
    by_hand = frechet_distance(*(Statistics(x.mean(axis=0), np.cov(x, rowvar=False)) for x in (flat, real)))
    for report in reports:
        assert report["frechet_distance"] == pytest.approx(by_hand, rel=1e-6)
        assert report["label"] == "Fréchet distance (values)" and report["extractor"] == "values"
        assert report["label_balance"] == {"classes": 4, "fewest": 37, "most": 38}
    assert "features: values" in capsys.readouterr().out


def test_features_default_to_values_for_arrays_and_inception_for_pictures(
    values: Path, tmp_path: Path, monkeypatch
) -> None:
    few = {"num": 6, "steps": 1}
    for samples in (values / "data", values / "run"):
        settings = few if samples.name == "run" else {}
        report = scores.evaluate_samples(
            samples, values / "data", None, settings=settings, out=tmp_path / "report.json"
        )
        assert report["extractor"] == "values"
    requested = []

    def refuse(name: str, **_: object) -> None:
        requested.append(name)
        raise ValueError("not installed")

    monkeypatch.setattr(scores, "load_extractor", refuse)
    monkeypatch.setattr(
        Sampler, "_images", None
    )  # a run of pictures must not be sampled before the extractor is loaded
    for samples in (folder(tmp_path / "pictures"), toy.finished()):
        with pytest.raises(ValueError, match="not installed"):
            scores.evaluate_samples(samples, "digits", None)
    assert requested == ["inception", "inception"]


def test_arrays_of_an_npz_are_evaluated(values: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for name in "ab":
        np.savez(tmp_path / f"{name}.npz", arr_0=rng.normal(size=(40, 3, 6)).astype(np.float32))
    report = scores.evaluate_samples(tmp_path / "a.npz", tmp_path / "b.npz", "values")
    assert report["num_images"] == report["reference_images"] == 40 and report["frechet_distance"] > 0
    arrays = decoded_images(Dataset.open(values / "data"))
    Statistics.of(arrays, ValuesExtractor((2, 8, 8))).save(tmp_path / "c.npz")
    with pytest.raises(ValueError, match=r"made by values .* \(128 features\), not by values .* \(18\)"):
        scores.evaluate_samples(tmp_path / "a.npz", tmp_path / "c.npz", "values")
    np.savez(tmp_path / "nan.npz", arr_0=np.full((4, 1, 3), np.nan, np.float32))
    with pytest.raises(ValueError, match=r"nan.npz holds numbers that are not finite in samples 0 to 3"):
        scores.evaluate_samples(tmp_path / "nan.npz", tmp_path / "b.npz", "values")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"cut\.npz"):
        scores.evaluate_samples(tmp_path / "cut.npz", tmp_path / "b.npz", "values")


def test_extractors_of_pictures_refuse_arrays(values: Path, scorer: Path, capsys) -> None:
    argv = [
        "evaluate",
        str(values / "run"),
        "--num=4",
        "--steps=2",
        "--reference",
        "digits",
        f"--features={scorer}",
    ]
    assert main(argv) == 1
    output = capsys.readouterr().err
    assert "scorer classifier takes pictures" in output and "--features values" in output


def test_previews_of_values_are_pictures(values: Path) -> None:
    (preview,) = (values / "run" / "vanilla" / "previews").iterdir()
    height, width, channels = np.asarray(Image.open(preview)).shape
    assert channels == 3 and height > 2 * 66 + 2 and width >= 2 * 66 + 2  # with the classes below


def test_compare_evaluates_values(values: Path, tmp_path: Path) -> None:
    config = override(toy.toy(), data=str(values / "data"))
    _, features, weights = shared_settings(config, tmp_path)
    assert features == "values" and weights is None
    measurement = Measurement.of(config, features, weights=None, images=130, block=2)
    point = measure_checkpoint(toy.checkpoint(values / "run", "vanilla"), measurement)
    assert point["metric"] == "Fréchet distance (values)" and point["distance"] > 0 and point["accuracy"] is None
    assert samples_of(values / "run", config.sample, 3).shape == (3, 2, 8, 8)


def test_classifier_of_values_measures_them(values: Path, tmp_path: Path) -> None:
    classifier = str(tmp_path / "c.safetensors")
    assert main(["classifier", str(values / "data"), "--out", classifier, "--epochs", "1"]) == 0
    config = override(toy.toy(), data=str(values / "data"))
    measurement = Measurement.of(config, classifier, weights=None, images=130, block=2)
    point = measure_checkpoint(toy.checkpoint(values / "run", "vanilla"), measurement)
    assert point["metric"] == "Fréchet distance (c classifier features)" and 0 <= point["accuracy"] <= 1


def test_analysis_of_values(values: Path, tmp_path: Path) -> None:
    assert main(["analyse", str(values / "run"), "--out", str(tmp_path), "--samples=40", "--timesteps", "0.4"]) == 0
    assert {"pca.png", "probes.png", "analyse.json"} <= {path.name for path in tmp_path.iterdir()}


def test_values_of_two_shapes_are_refused_with_both() -> None:
    extractor = ValuesExtractor((1, 8, 32))  # that of the samples; the reference is read later
    with pytest.raises(
        ValueError, match=r"images of 1x20 cannot be compared with images of 1x8x32; give samples and ref"
    ):
        extractor(np.zeros((3, 1, 20), dtype=np.float32))


@pytest.mark.parametrize("command", ["evaluate", "classifier", "analyse", "analyse --target"])
def test_paths_that_cannot_be_written_are_refused_before_any_work(
    scorer: Path, tmp_path: Path, monkeypatch, capsys, command: str
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(Sampler, "sample", None)
    monkeypatch.setattr(Statistics, "of", None)
    words = {
        "evaluate": [
            str(toy.finished()),
            "--reference=digits",
            f"--features={scorer}",
            f"--out={tmp_path}/file/a.json",
        ],
        "classifier": [str(toy.digits()), f"--out={tmp_path}/file/c.safetensors"],
        "analyse": [str(toy.finished()), f"--out={tmp_path}/file/a"],
        "analyse --target": [str(toy.finished()), "--target", f"--out={tmp_path}/file/a"],
    }[command]
    assert main([command.split()[0], *words]) == 1
    assert "file is not a folder); choose another path" in capsys.readouterr().err.splitlines()[-1]


def test_numbers_are_shown_where_the_report_cannot_be_written(
    scorer: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    def full(path: Path, _: object) -> None:
        raise ValueError(f"{path} cannot be written (No space left on device)")

    monkeypatch.setattr(scores, "write_json", full)
    pictures = folder(tmp_path / "made")
    assert main(["evaluate", str(pictures), f"--reference={pictures}", f"--features={scorer}"]) == 1
    said = capsys.readouterr()
    assert "Fréchet distance" in said.out and "No space left" in said.err.splitlines()[-1]


def test_text_lists_all_that_the_numbers_depend_on() -> None:
    made = dict.fromkeys(scores.SETTINGS) | {
        "precision": "fp16",
        "guidance_interval": [0.0, 0.65],
        "labels": [3] * 5000,
    }
    made |= {
        "velocity_scale": 1.05,
        "time_shift": 2.0,
        "guidance_channels": 3,
        "autoguidance": {"stage": "s", "step": 2, "weights": "ema"},
    }
    report = {"frechet_distance": 1.0, "num_images": 5000, "samples": "a", "reference": "b", "reference_images": None,
              "extractor": "e", "extractor_sha256": "0" * 64, "made": made, "label_balance": None, "note": ""}  # fmt: skip
    text = scores.text(report)
    for said in ("precision fp16", "guidance interval [0, 0.65]", "labels 5,000 listed", "time shift 2.0", "steps unknown",
                 "velocity times 1.05",
                 "guided channels 3", "guided by a weaker model (s, step 2, ema)"):  # fmt: skip
        assert said in text, said
    assert "labels [3, 4]" in scores.text(report | {"made": made | {"labels": [3, 4]}})
