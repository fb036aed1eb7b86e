"""What is suggested for an option that a command does not have."""

import pytest

from selftrans.cli.unknown_option import unrecognised

TRAIN = ["out", "data", "train.steps", "train.lr", "train.batch-size", "stage1.steps", "sample.steps", "sample.num"]
TRAIN += ["data.on-device", "train.precision", "sample.precision", "repa.block", "init", "train.accumulate"]
TRAIN += ["train.checkpoint-every", "train.keep-every", "train.preview-every", "log.every"]
SAMPLE = ["out", "num", "steps", "size", "guidance-scale", "batch-size", "precision"]
PREPARE = ["out", "resolution", "shard-size", "batch-size"]


@pytest.mark.parametrize(
    ("flag", "known", "expected"),
    [
        ("--lr", TRAIN, "; did you mean --train.lr?"),
        ("-lr", TRAIN, "; did you mean --train.lr?"),
        ("--optim.lr", TRAIN, "; did you mean --train.lr?"),
        ("--trian.steps=3", TRAIN, "; did you mean --train.steps?"),
        ("--train.num", TRAIN, "; did you mean --sample.num?"),
        ("--learning_rate", TRAIN, "; did you mean --train.lr?"),
        ("--train.learning-rate", TRAIN, "; did you mean --train.lr?"),
        ("--precision", TRAIN, "; did you mean --train.precision or --sample.precision?"),
        ("--mixed-precision", TRAIN, "; did you mean --train.precision or --sample.precision?"),
        ("--gradient-accumulation-steps", TRAIN, "; did you mean --train.accumulate?"),
        ("--epochs", TRAIN, ": training is counted in steps; did you mean --train.steps?"),
        ("--epochs", SAMPLE, ""),
        ("--train.log-every", TRAIN, "; did you mean --log.every?"),
        ("--log-every", TRAIN, "; did you mean --log.every?"),
        ("--ckpt-every", TRAIN, "; did you mean --train.checkpoint-every?"),
        ("--train.save-steps", TRAIN, "; did you mean --train.checkpoint-every?"),
        ("--sample-every", TRAIN, "; did you mean --train.preview-every?"),
        ("--output-dir", TRAIN, "; did you mean --out?"),
        ("--cfg-scale", SAMPLE, "; did you mean --guidance-scale?"),
        ("--num-images", SAMPLE, "; did you mean --num?"),
        ("--stpes", SAMPLE, "; did you mean --steps?"),
        ("--resolution", SAMPLE, "; did you mean --size?"),
        ("--size", PREPARE, "; did you mean --resolution?"),
        ("--xyzzy", TRAIN, ""),
        ("--resume", TRAIN, ": the same command again continues what was interrupted"),
    ],
)
def test_suggestions(flag, known, expected):
    assert unrecognised([flag], known) == f"option {flag.partition('=')[0]} is unknown{expected}"


@pytest.mark.parametrize("flag", ["--device", "--cuda", "--train.device", "--data.devices", "--gpus=2"])
def test_the_device_is_found_by_itself(flag):
    assert "is unknown: the device is found automatically" in unrecognised([flag], TRAIN)


@pytest.mark.parametrize("flag", ["--resolution", "--data.image-size"])
def test_training_takes_the_size_of_the_data(flag):
    assert unrecognised([flag], TRAIN).endswith(
        "the pictures have the size that `selftrans prepare --resolution` gave them"
    )


def test_a_word_without_dashes_is_too_many():
    assert unrecognised(["32", "--lr"], ["lr"]).startswith("option --lr")
    assert unrecognised(["32"], ["lr"]) == "'32' is one argument too many"
