"""Prompt control: correlations against scipy, what a perfect and an indifferent sampler score, and a run from end to end."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from selftrans.checkpoints.load import load_model
from selftrans.data.prepare import BUILT_IN, prepare
from selftrans.data.sources.digit_attributes import ATTRIBUTES
from selftrans.data.sources.digit_captions import RESERVED, TRAINED
from selftrans.evaluate.classifier import digits
from selftrans.recipes import recipe
from selftrans.sampling.images import Sampler
from selftrans.train.run import train
from tests.support.scripts import script

module = script("prompt_control")


class NearestMean:
    """An extractor of four features; its logits are those of the nearest mean scan, which is right for 9 of 10 scans."""

    name, sha256, dim, pictures = "nearest mean", "0" * 64, 4, True

    def __init__(self):
        images, labels = digits()
        self.means = np.stack([images[labels == digit].mean(axis=0).ravel() for digit in range(10)])

    def __call__(self, images):
        flat = images.reshape(len(images), -1).astype(np.float64)
        corners = images.reshape(len(images), 2, 4, 2, 4).mean(axis=(2, 4)).reshape(-1, 4)
        return {"features": corners, "logits": -((flat[:, None] - self.means) ** 2).sum(axis=-1)}


@pytest.fixture(scope="module")
def scans():
    return module.Scans(NearestMean())


def test_correlations_are_those_of_scipy():
    rng = np.random.default_rng(0)
    x = rng.integers(-1, 2, size=200).astype(float)
    y = x + rng.normal(size=200)
    assert module.correlation(x, y) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-12)
    assert module.correlation(stats.rankdata(x), stats.rankdata(y)) == pytest.approx(
        stats.spearmanr(x, y).statistic, abs=1e-12
    )
    assert module.correlation(x, np.ones(200)) == 0
    times = rng.integers(3, size=(4, 200))
    for row, found in zip(times, module.correlation(x, y, times), strict=True):
        assert found == pytest.approx(stats.pearsonr(np.repeat(x, row), np.repeat(y, row)).statistic, abs=1e-12)


def test_intervals_are_about_those_of_the_normal_approximation():
    rng = np.random.default_rng(0)
    n = 500
    level = rng.integers(-1, 2, size=(n, len(ATTRIBUTES))).astype(float)
    level[::2, 0] = np.nan  # not mentioned in every other prompt
    value = level + rng.normal(size=level.shape)
    value[:, 1] = rng.normal(size=n)  # not controlled
    digit = rng.integers(10, size=n)
    found = module.summary(
        module.Measured(digit, np.where(np.arange(n) < 0.9 * n, digit, (digit + 1) % 10), level, value)
    )
    assert found["images"] == n and found["digit"][0] == pytest.approx(0.9)
    half = 1.96 * np.sqrt(0.9 * 0.1 / n)
    np.testing.assert_allclose(found["digit"][1:], [0.9 - half, 0.9 + half], atol=0.006)
    names = list(ATTRIBUTES)
    assert found[names[0]]["mentioned"] == n // 2 and found[names[2]]["mentioned"] == n
    r, low, high = found[names[2]]["pearson"]
    z = np.arctanh(r) + np.array([-1.96, 1.96]) / np.sqrt(n - 3)  # Fisher
    np.testing.assert_allclose([low, high], np.tanh(z), atol=0.02)
    assert found[names[1]]["pearson"][1] < 0 < found[names[1]]["pearson"][2]
    assert high - low < found[names[0]]["pearson"][2] - found[names[0]]["pearson"][1]


def test_scans_follow_their_own_captions_and_others_do_not(scans):
    measured = scans.bound()
    found = module.summary(measured)
    assert found["digit"][0] > 0.88
    assert all(0.85 < found[name]["pearson"][0] < 0.95 for name in ATTRIBUTES)  # of a normal value and its thirds: 0.89
    order = np.random.default_rng(0).permutation(len(measured.digit))
    other = module.summary(scans.measured(scans.images, scans.labels[order], measured.level[order]))
    assert other["digit"][0] < 0.15
    value = measured.value
    for digit in range(10):
        rows = value[measured.digit == digit]
        np.testing.assert_allclose(rows.mean(axis=0), 0, atol=1e-9)
        np.testing.assert_allclose(rows.std(axis=0), 1, atol=1e-9)


def test_both_wordings_ask_for_the_same():
    trained, reserved = module.asked(TRAINED, 100), module.asked(RESERVED, 100)
    assert trained.what == reserved.what and not set(trained.texts) & set(reserved.texts)
    level = module.levels_of(trained.what)
    assert level.shape == (100, len(ATTRIBUTES)) and set(np.unique(level[~np.isnan(level)])) == {-1, 0, 1}
    assert np.isnan(level).any() and (~np.isnan(level)).any(axis=1).all()


def test_pooled_runs_are_one_set(scans):
    few = module.Measured(*(part[:50] for part in scans.bound()))
    both = module.pooled([few, few])
    assert (
        both.value.shape == (100, len(ATTRIBUTES))
        and module.summary(both)["digit"][0] == module.summary(few)["digit"][0]
    )


def test_a_run_is_sampled_from_prompts_and_measured_once(tmp_path, scans):
    prepare("digits_t2i", tmp_path / "data", text=replace(BUILT_IN["digits_t2i"], store="ids"), progress=False)
    changes = {"method": "vanilla", "data.path": str(tmp_path / "data"), "train.steps": 2, "train.batch_size": 8}
    small = {"model.width": 32, "model.depth": 2, "train.preview_every": 0, "sample.steps": 2}
    train(recipe("digits_t2i").override(changes | small).restricted(), tmp_path / "run", quiet=True)
    control = module.PromptControl(scans, tmp_path / "measured", images=20)
    measured, record = control.measure(tmp_path / "run", "reserved", 2.0)
    assert measured.digit.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9] * 2 and measured.value.shape == (
        20,
        len(ATTRIBUTES),
    )
    assert (record["step"], record["guidance_scale"], record["num"]) == (2, 2.0, 20) and record["distance"] > 0
    (file,) = (tmp_path / "measured").iterdir()
    begun = file.stat().st_mtime_ns
    again, same = control.measure(tmp_path / "run", "reserved", 2.0)
    assert same == record and file.stat().st_mtime_ns == begun
    for one, other in zip(measured, again, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    settings = replace(load_model(tmp_path / "run").config.sample, num=3, seed=1, guidance_scale=2.0)
    sampler = Sampler.of(load_model(tmp_path / "run"), replace(settings, prompts=module.asked(RESERVED, 20).texts))
    images = next(iter(sampler.sample())).images
    alone = scans.measured(images, measured.digit[:3], measured.level[:3])
    np.testing.assert_allclose(alone.value, measured.value[:3], atol=0.2)  # a grey value may round to the next
    file.write_text("{")
    assert control.measure(tmp_path / "run", "reserved", 2.0)[1] == record
