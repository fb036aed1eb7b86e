"""The command line as a user types it: help, exit statuses, one line per error, and what evaluate and analyse write."""

import contextlib
import errno
import io
import json
import math
import os
import signal
import subprocess
import sys
import tomllib
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from selftrans import __version__
from selftrans.cli.commands import COMMANDS
from selftrans.cli.main import Terminated, _refuse_secrets, main
from selftrans.data.dataset import Dataset
from selftrans.data.decoded import data_latents
from selftrans.train.interrupted import Interrupted
from tests.support import captioned, toy
from tests.support.pictures import encoded, noise, write
from tests.support.toy import quick  # noqa: F401 - a fixture
from tests.unit.cli.lines import ends_with, one_line

ROOT = Path(__file__).parents[3]

# ---- help


def test_overview_lists_every_command(capsys):
    for argv in ([], ["-h"], ["--help"]):
        assert main(argv) == 0
        printed = capsys.readouterr().out
        assert "usage: selftrans COMMAND" in printed
        assert all(f"\n  {name} " in printed for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_starts_with_its_docstring(name, capsys):
    assert main([name, "--help"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"usage: selftrans {name}" in printed
    assert (COMMANDS[name].__doc__ or "").split("\n")[0][:60] in printed


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version(flag, capsys):
    assert main([flag]) == 0
    assert capsys.readouterr().out == f"selftrans {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "status"),
    [
        ("--help", 0),
        ("--version", 0),
        ("nonsense", 2),
        ("sample --help", 0),
        ("evaluate --help", 0),
        ("sample run --out x --stpes 3", 2),
        ("import file", 2),
    ],
)
def test_help_and_wrong_arguments_load_no_torch(argv, status):
    assert ends_with(argv, "torch", "numpy", "accelerate") == str(status)


#: run in a process of its own; prints, as json: wrong exit statuses, packages that were loaded, modules of selftrans, the most
#: seconds
EVERY_PAGE = """
import contextlib, io, json, sys, time
at_first = {*sys.modules}
from selftrans.cli.commands import COMMANDS
from selftrans.cli.main import main
started = time.process_time()  # of this process, the start of Python included
lines = [f"{name} {word}" for name in COMMANDS for word in ("--help", "--nonsense")]
lines += ["train digits --help", "train digits --method sra --help", "compare digits --help"]
lines += ["train digits --out=x --train.stpes=3", "sample x --out=y --num=many", "sample x --labels", "prepare x", "evaluate x"]
wrong, longest = [], 0.0
for line in lines:
    before = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        status = main(line.split())
    wrong += [line] * (status != (0 if "--help" in line else 2))
    longest = max(longest, time.process_time() - before)
loaded = [name.partition(".")[0] for name in sys.modules if name not in at_first]
packages = sorted({*loaded} - sys.stdlib_module_names)
print(json.dumps([wrong, packages, loaded.count("selftrans"), started + longest]))
"""


def test_help_and_wrong_arguments_of_every_command_load_no_library():
    """None but tyro, with what it needs, and few modules of this package: less than half a second of one core."""
    done = subprocess.run([sys.executable, "-c", EVERY_PAGE], capture_output=True, text=True, check=True)
    wrong, packages, modules, seconds = json.loads(done.stdout)
    of_tyro = {"docstring_parser", "typeguard", "typing_extensions", "tyro"}
    assert wrong == [] and of_tyro <= {*packages} <= of_tyro | {"selftrans"}, done.stdout
    assert modules <= 30 and seconds < 0.5, done.stdout


# ---- wrong commands: status 2, one line


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("trian digits", "command 'trian' is unknown; did you mean train? (see selftrans --help)"),
        ("smaple run", "command 'smaple' is unknown; did you mean sample? (see selftrans --help)"),
        ("xyz", "command 'xyz' is unknown (see selftrans --help)"),
        ("--verison", "option --verison is unknown; did you mean --version? (see selftrans --help)"),
    ],
)
def test_unknown_commands(argv, expected, capsys):
    assert main(argv.split()) == 2
    assert one_line(capsys) == f"selftrans: {expected}\n"


@pytest.mark.parametrize("command", ["sample", "prepare", "classifier", "export", "import"])
def test_empty_first_argument_is_not_the_working_directory(command, tmp_path, capsys):
    assert main([command, "", "--out", str(tmp_path / "out")]) == 2
    assert one_line(capsys) == f"selftrans: the first argument is empty (see selftrans {command} --help)\n"


# ---- exit statuses


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("no\nsuch thing"), 1, "no such thing"),
        (ValueError("12\u202f000\xa0a  b.png: bad"), 1, "12\\u202f000\\xa0a  b.png: bad"),
        (OSError("disk full"), 1, "disk full"),
        (ImportError("no torch_fidelity"), 1, "no torch_fidelity"),
        (FloatingPointError("not finite"), 1, "not finite"),
        (Interrupted("stopped at step 3"), 75, "stopped at step 3"),
        (KeyboardInterrupt(), 130, "interrupted; the same command continues"),
        (OSError(errno.ENOSPC, "No space left"), 1, "No space left; free disk space, then repeat the command"),
        (OSError(errno.ENOSPC, "No space left", "a"), 1, "a: No space left; free disk space, then repeat the command"),
        (OSError(errno.EROFS, "Read-only", "a"), 1, "a: Read-only; choose another folder"),
        (
            FileNotFoundError(errno.ENOENT, "No such file"),  # of os.getcwd()
            1,
            "No such file: the working directory may have been removed; change into another",
        ),
        (OSError(errno.EIO, "Input/output error", "a"), 1, "a: Input/output error"),
        (OSError(errno.EIO, "Input/output error"), 1, "[Errno 5] Input/output error"),
        (KeyboardInterrupt("stopped by SIGINT"), 130, "stopped by SIGINT"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried"),
            1,
            "out of memory (CUDA out of memory. Tried); work on fewer samples at a time (--batch-size), or on smaller ones",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes\nmore"),
            1,
            "out of memory (DefaultCPUAllocator: can't allocate memory: 9 bytes); work on fewer samples at a time "
            "(--batch-size), or on smaller ones",
        ),
    ],
)
def test_exit_status_of_each_error(error, status, line, monkeypatch, capsys):
    def run(self):
        raise error

    monkeypatch.setattr(COMMANDS["quickstart"], "run", run)
    assert main(["quickstart"]) == status
    assert one_line(capsys) == f"selftrans: {line}\n"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("prepare a --out b", "the same command continues"),
        ("sample run --out b", "the same command continues"),
        ("export run --out b", "the same command starts again"),
        ("classifier data --out b", "the same command continues"),
        (
            "evaluate run --reference digits",
            "the same command starts again; to be able to continue, make the pictures by",
        ),
    ],
)
def test_interrupted_commands_say_whether_they_continue(argv, expected, monkeypatch, capsys):
    def run(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(COMMANDS[argv.split()[0]], "run", run)
    assert main(argv.split()) == 130
    assert one_line(capsys).startswith(f"selftrans: interrupted; {expected}")


@pytest.mark.parametrize(
    ("argv", "number", "status", "line"),
    [
        ("sample run --out b", "SIGTERM", 143, "selftrans: stopped by SIGTERM; the same command continues\n"),
        ("sample run --out b", "SIGHUP", 129, "selftrans: stopped by SIGHUP; the same command continues\n"),
        ("train digits --out b", "SIGTERM", 0, ""),  # which has its own handling
        ("train digits --out b", "SIGHUP", 0, ""),
    ],
)
def test_sigterm_and_a_closed_terminal_end_a_command_as_ctrl_c_does(argv, number, status, line, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["selftrans", *argv.split()])
    monkeypatch.setattr(COMMANDS[argv.split()[0]], "run", lambda self: signal.raise_signal(signal.Signals[number]))
    monkeypatch.setattr(Terminated, "last", -math.inf)
    with restored(lambda *_: None):
        assert main() == status
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("code", ["import runpy; runpy.run_module('selftrans', run_name='__main__')", "{entry_point}"])
def test_ctrl_c_while_the_command_line_is_loading_is_one_line(code):
    """SIGINT at the import of a module that `selftrans.cli.main` needs."""
    target = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["selftrans"]
    module, function = target.split(":")
    interrupt = (
        "import os, signal, sys\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'selftrans.cli.overrides': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupting())\n"
    )
    code = code.format(entry_point=f"from {module} import {function}; sys.exit({function}())")
    done = subprocess.run([sys.executable, "-c", interrupt + code, "doctor"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "selftrans: interrupted\n")


def test_command_goes_on_after_its_terminal_where_nohup_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["selftrans", "sample", "run", "--out", "b"])
    monkeypatch.setattr(COMMANDS["sample"], "run", lambda self: signal.raise_signal(signal.SIGHUP))
    with restored(signal.SIG_IGN):
        assert main() == 0
    assert not capsys.readouterr().err


@contextlib.contextmanager
def restored(handler):
    """`handler` for the signals that `main` handles, and what was there before afterwards."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def test_second_sigterm_of_timeout_does_not_break_off_the_end_of_a_command(monkeypatch, capsys):
    """`timeout` sends it to its command, and at once again to the group of processes."""

    def run(self):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            ended.append(True)

    ended = []
    monkeypatch.setattr(sys, "argv", ["selftrans", *["sample", "run", "--out", "b"]])
    monkeypatch.setattr(COMMANDS["sample"], "run", run)
    monkeypatch.setattr(Terminated, "last", -math.inf)
    with restored(signal.SIG_DFL):
        assert main() == 143 and ended
    assert capsys.readouterr().err == "selftrans: stopped by SIGTERM; the same command continues\n"


# ---- prepare


def test_warnings_of_libraries_are_not_shown_whatever_the_folder_is_called(monkeypatch, capsys):
    def warn():
        warnings.warn_explicit("own", UserWarning, COMMANDS["doctor"].run.__code__.co_filename, 1)
        warnings.warn_explicit("of a library", UserWarning, "/a/selftrans/.venv/lib/torch/nn.py", 1)
        return {}

    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # put back afterwards
    monkeypatch.setattr("selftrans.experiments.doctor.examine", lambda folder: warn())
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["doctor", "--json"]) == 0
    assert capsys.readouterr().err == "selftrans: warning: own\n"


def test_prepare_with_captions(tmp_path, capsys):
    where, encoder = captioned.pictures(tmp_path / "x", 4), captioned.save_text_encoder(tmp_path / "encoder")
    flags = f"--text {encoder} --text-tokens 9 --text-dtype bfloat16 --text-store ids --captions-per-picture 2"
    assert main(f"prepare {where} --out {tmp_path}/a {flags}".split()) == 0
    shown = capsys.readouterr()
    assert f"at most 2 captions each, text of 9x16 by {encoder}, stored as ids" in shown.out
    assert shown.out.endswith(f"next: selftrans train imagefolder_t2i --data {tmp_path}/a --out RUN\n")
    assert "6 captions of 4 pictures, at most 2 each (2 more left out: --captions-per-picture); their ids" in shown.err
    images = [{"id": i, "file_name": f"{i:03d}.png"} for i in range(4)]
    captions = [{"image_id": i, "caption": "from the json"} for i in range(4)]
    (tmp_path / "c.json").write_text(json.dumps({"images": images, "annotations": captions}))
    flags = f"--text {encoder} --captions {tmp_path}/c.json"
    assert main(f"prepare {where} --out {tmp_path}/b {flags}".split()) == 0
    assert Dataset.open(tmp_path / "b").captions([3]) == [["from the json"]]
    capsys.readouterr()
    assert main(f"prepare {where} --out {tmp_path}/c --captions {tmp_path}/c.json".split()) == 0
    assert "--captions is ignored without --text" in capsys.readouterr().err


# ---- bad input: status 1, one line


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("train imagefolder --out x", "needs --data DIR"),
        ("train imagefolder --out x --data nowhere", "no manifest.json in nowhere"),
        ("train digits --out x --method repa2", "method 'repa2' is unknown"),
        ("train digits --out x --model.name SiT-Q/2", "did you mean SiT-"),
        ("train digits --out x --train.steps=-3", "train.steps must be above zero, not -3"),
        ("train digits --out x --model.heads 0", "model.heads must be above zero, not 0"),
        ("train digits --out x --model.heads 7", "width 64 is not a multiple of heads 7"),
        ("train digits --out file", "file"),
        ("sample nowhere --out x", "nowhere does not exist; expected a run directory"),
        ("analyse nowhere --out x", "nowhere does not exist"),
        ("evaluate nowhere --reference digits --features digitz", "did you mean digits?"),
        ("evaluate nowhere --reference digits --features x.safetensors", "x.safetensors"),
        ("classifier nowhere --out x", "no manifest.json in nowhere"),
        ("prepare nowhere --out x", "no source of pictures 'nowhere'"),
    ],
)
def test_bad_input(argv, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    assert main(argv.split()) == 1
    assert expected in one_line(capsys)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("prepare {long} --out x", "{start}: File name too long; give a shorter name"),
        ("sample {long} --out x", "{start}: File name too long; give a shorter name"),
        ("evaluate {long} --reference digits", "{start}: File name too long; give a shorter name"),
        ("train digits --out {long}", "{start}: File name too long; give a shorter name"),
        ("train digits --out file/x", "the folder file/x cannot be made (Not a directory); choose another --out"),
        ("train digits --out file", "file is not a folder; choose another --out"),
        ("prepare folder --out circle", "circle"),
        ("prepare circle --out x", "no source of pictures 'circle'"),
    ],
)
def test_paths_that_cannot_be(argv, expected, capsys, tmp_path, monkeypatch):
    """Too long a name, a file where a folder should be, links in a circle."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    toy.pictures(tmp_path / "folder")
    (tmp_path / "circle").symlink_to("circle")
    long = "b" * 300
    assert main(argv.format(long=long).split()) == 1
    assert expected.format(start=f"{long[:157]}...") in one_line(capsys)


def test_data_of_another_shape_or_class_count_than_the_checkpoints(tmp_path, capsys):
    colour, finished = toy.prepared(tmp_path / "colour"), toy.finished()
    capsys.readouterr()
    train = ["train", "imagefolder", f"--data={colour}", f"--out={tmp_path / 'run'}", *toy.taught_flags()]
    assert main([*train, f"--teacher={finished}"]) == 1
    assert "was trained on latents (1, 8, 8) with 10 classes; expected (3, 8, 8) with 2 classes" in one_line(capsys)
    assert main([*train, "--data.shape", "4", "8", "8"]) == 1
    assert "holds latents (3, 8, 8), but data.shape expects (4, 8, 8)" in one_line(capsys)
    assert main([*train, "--data.classes=3"]) == 1
    assert "has 2 classes, but data.classes expects 3" in one_line(capsys)
    assert main(["analyse", str(finished), f"--data={colour}", f"--out={tmp_path / 'a'}"]) == 1
    line = one_line(capsys)
    assert "(3, 8, 8) with 2 classes" in line and "(1, 8, 8) with 10" in line and "--data" in line
    assert not (tmp_path / "a").exists()
    run = toy.copy(toy.finished(), tmp_path / "copy")
    assert main(["train", "digits", f"--data={colour}", f"--out={run}", *toy.flags()]) == 1
    assert "was trained on other data than" in one_line(capsys)


@pytest.mark.parametrize(
    "argv",
    [
        "train digits --model.heads 7",
        "train digits --teacher nowhere",
        "compare digits --methods vanilla sra --features nowhere.safetensors",
    ],
)
def test_refused_command_leaves_nothing_behind(argv, tmp_path, capsys):
    for out in (tmp_path / "new", tmp_path / "there"):
        (tmp_path / "there").mkdir(exist_ok=True)
        assert main([*argv.split(), f"--out={out}"]) == 1
        assert os.listdir(tmp_path) == ["there"] and not os.listdir(tmp_path / "there")
    (tmp_path / "there" / "mine").write_text("kept")
    assert main([*argv.split(), f"--out={tmp_path / 'there'}"]) == 1
    assert os.listdir(tmp_path / "there") == ["mine"]


def test_refused_preparation_may_be_repeated_with_other_options(tmp_path, capsys):
    pictures = toy.pictures(tmp_path / "pictures")
    broken = sorted(pictures.rglob("*.png"))[0]
    whole = broken.read_bytes()
    broken.write_bytes(whole[:40])
    argv = ["prepare", str(pictures), f"--out={tmp_path / 'out'}"]
    assert main([*argv, "--resolution=8"]) == 1
    assert "--skip-bad" in capsys.readouterr().err
    assert main([*argv, "--resolution=4x6", "--skip-bad"]) == 0
    assert "3x4x6 latents" in capsys.readouterr().out


# ---- evaluate, classifier, analyse


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Samples of the toy run, and a classifier of the digits."""
    folder = tmp_path_factory.mktemp("results")
    assert main(["sample", str(toy.finished()), f"--out={folder / 'samples'}", "--num=30", "--steps=2"]) == 0
    assert main(["classifier", str(toy.digits()), f"--out={folder / 'judge.safetensors'}", "--epochs=1"]) == 0
    return folder


def test_paths_with_control_characters_are_shown_on_one_line(tmp_path, capsys):
    """Of a command that succeeds, of a warning and of an error: a terminal would carry out what the name of a folder says."""
    odd = tmp_path / "two\nlines \x1b[31m"
    assert main(["export", str(toy.finished()), "--out", str(odd)]) == 0
    assert capsys.readouterr().out.endswith("two\\nlines \\x1b[31m/model.safetensors\n")
    assert main(["sample", str(odd / "absent"), "--out", str(tmp_path / "s")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "\x1b" not in error and "lines \\x1b[31m/absent does not exist" in error


def test_classifier_prints_its_accuracy(results, tmp_path, capsys):
    path = tmp_path / "again.safetensors"
    assert main(["classifier", str(toy.digits()), f"--out={path}", "--epochs=1"]) == 0
    assert capsys.readouterr().out.startswith(f"{path}: accuracy 0.") and path.exists()
    flat = toy.prepared(tmp_path, classes=())
    assert main(["classifier", str(flat), f"--out={tmp_path / 'x'}"]) == 1
    assert "must end in .safetensors" in one_line(capsys)
    assert main(["classifier", str(flat), f"--out={tmp_path / 'x.safetensors'}"]) == 1
    line = one_line(capsys)
    assert "has 0 classes; a classifier needs at least two: prepare pictures in one folder for each class" in line
    assert "evaluate --features inception" in line, "what serves where there are no classes"


def test_evaluate_samples_with_their_labels(results, capsys):
    samples, judge = results / "samples", results / "judge.safetensors"
    assert main(["evaluate", str(samples), f"--reference={toy.digits()}", f"--features={judge}"]) == 0
    text, shown = capsys.readouterr().out, json.loads((samples / "evaluate.json").read_text())
    assert f"Fréchet distance          {shown['frechet_distance']:.5g}" in text and "steps 2" in text
    assert shown["label_balance"] == {"classes": 10, "fewest": 3, "most": 3} and ", 3 images of each of 10" in text
    assert shown["made"]["steps"] == 2 and shown["made"]["num"] == 30 and 0 <= shown["accuracy"] <= 1
    assert "FID" not in json.dumps(shown)
    assert main(["evaluate", str(samples), "--reference=digits", f"--features={judge}"]) == 0
    again = json.loads((samples / "evaluate.json").read_text())
    assert again[again["metric"]] == pytest.approx(shown[shown["metric"]], rel=1e-6)  # prepared digits are the digits


def test_folder_evaluated_against_itself_has_distance_zero(results, tmp_path, capsys):
    for k in range(20):
        array = np.random.default_rng(k).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(array).save(tmp_path / f"{k}.png")
    argv = ["evaluate", str(tmp_path), f"--reference={tmp_path}", f"--features={results / 'judge.safetensors'}"]
    assert main(argv) == 0
    shown, (text, bars) = json.loads((tmp_path / "evaluate.json").read_text()), capsys.readouterr()
    assert shown[shown["metric"]] == pytest.approx(0, abs=1e-2)
    assert 0 <= bars.find("measuring the reference:") < bars.find("measuring the samples:")
    assert (
        "how the samples were made is not recorded" in text
        and "steps unknown" not in text
        and shown["made"]["sampler"] is None
    ), "the folder has no record of its settings"


def test_evaluate_names_the_input_of_another_shape(results, tmp_path, capsys):
    for name, side in {"small": 8, "large": 12}.items():
        (tmp_path / name).mkdir()
        for k in range(3):
            Image.fromarray(np.full((side, side), k, dtype=np.uint8)).save(tmp_path / name / f"{k}.png")
    small, large, judge = tmp_path / "small", tmp_path / "large", results / "judge.safetensors"
    for samples, reference, features, expected in (
        (small, large, "values", f"reference {large}: images of 12x12x1 cannot be compared with images of 8x8x1"),
        (small, large, judge, f"reference {large}: the judge classifier"),
        (large, small, judge, f"samples {large}: the judge classifier"),
    ):
        assert main(["evaluate", str(samples), f"--reference={reference}", f"--features={features}"]) == 1
        assert expected in capsys.readouterr().err
    Image.fromarray(np.zeros((12, 8), dtype=np.uint8)).save(small / "7.png")
    assert main(["evaluate", str(large), f"--reference={small}", "--features=values"]) == 1
    assert f"7.png in {small} is 12x8, others 8x8" in capsys.readouterr().err


def test_evaluate_refuses_incomplete_samples(results, tmp_path, capsys):
    samples = toy.copy(results / "samples", tmp_path / "samples")
    (samples / "samples.npz").unlink()
    argv = ["evaluate", str(samples), "--reference=digits", f"--features={results / 'judge.safetensors'}"]
    assert main(argv) == 1
    assert "is not complete; repeat the `selftrans sample` command" in one_line(capsys)
    for name, content in {"samples.npz": "no archive", "samples.json": "[]"}.items():
        (samples / name).write_text(content)
        assert main(argv) == 1
        assert f"{samples} is damaged" in one_line(capsys)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut short"])
def test_evaluate_refuses_a_reference_that_is_no_archive(results, tmp_path, capsys, content):
    (tmp_path / "reference.npz").write_bytes(content)
    argv = ["evaluate", str(results / "samples"), f"--reference={tmp_path / 'reference.npz'}"]
    assert main([*argv, f"--features={results / 'judge.safetensors'}"]) == 1
    assert "reference.npz cannot be read" in one_line(capsys)


def test_analyse_writes_pictures_and_report(tmp_path, capsys):
    before = toy.tree(toy.finished())
    out = tmp_path / "new" / "seen"
    argv = ["analyse", str(toy.finished()), f"--out={out}", "--timesteps", "0.3", "0.6", "--samples=60"]
    assert main(argv) == 0
    assert sorted(os.listdir(out)) == ["analyse.json", "pca.png", "probes.png", "tsne-t0.3.png", "tsne-t0.6.png"]
    report = json.loads((out / "analyse.json").read_text())
    assert report["blocks"] == [1, 2, 3] and report["images"] == 60
    assert (report["stage"], report["step"]) == ("stage2", 8)
    assert {t: len(accuracy) for t, accuracy in report["probe_accuracy"].items()} == {"0.3": 3, "0.6": 3}
    _, labels = data_latents(Dataset.open(report["data"]), 60)
    assert report["chance"] == Counter(labels.tolist()).most_common(1)[0][1] / 60
    for name in ("pca.png", "probes.png"):
        pixels = np.asarray(Image.open(out / name))
        assert min(pixels.shape[:2]) > 200 and len(np.unique(pixels)) > 50
    assert toy.tree(toy.finished()) == before


# ---- as a process


def test_error_of_a_process_is_one_line(tmp_path):
    command = [sys.executable, "-m", "selftrans", "train", "digits", "--out", "run", "--model.width=3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    expected = "positions on 2 axes need a multiple of 4 channels, not 3, and at least 4; change model.width"
    assert done.stderr == f"selftrans: {expected}\n"


@pytest.mark.parametrize(
    "argv",
    [
        "train digits --init URL --out o",
        "train digits --data=URL",
        "train digits --dat URL",
        "evaluate URL --reference digits",
        "prepare URL --out p",
        "sample URL",
    ],
)
def test_urls_with_credentials_are_not_repeated_by_any_command(argv, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for url in (
        "https://me:hunter2@host/x",
        "https://host/x?X-Amz-Signature=hunter2",
        "s3://hunter2:hunter2@bucket/x",
        "zip://a/b::s3://k:hunter2@b/x.zip",
        "[s3://k:hunter2@b/x]",
    ):
        assert main(argv.replace("URL", url).split()) == 1
        shown = one_line(capsys)
        part = "query" if "?" in url else "user or password"
        assert f"a URL with a {part} is refused" in shown and "hunter2" not in shown
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ["--sample.prompts", "https://x.org/?q=cat on a mat"],
        ["--prompts", "a", "https://x.org/?q=cat", "--data", "s3://bucket/class_token:8/x"],
        ["see https://x.org/?q=cat"],
        ["file:///data/run#1"],
    ],
)
def test_sentences_and_names_of_folders_hold_no_secrets(words):
    _refuse_secrets(words)


def test_password_in_a_word_with_a_space_is_refused():
    with pytest.raises(ValueError, match="user or password"):
        _refuse_secrets(["--prompts", "a", "--data", "s3://k:hunter2@b/a b"])


def test_names_that_the_terminal_cannot_show_do_not_fail_a_command(tmp_path, monkeypatch):
    where, shown = write(tmp_path / "x", {"a.png": encoded(noise(8))}), io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(shown, encoding="ascii", write_through=True))
    assert main(["prepare", str(where), "--out", str(tmp_path / "ü猫")]) == 0
    assert rb"-> " in shown.getvalue() and rb"\xfc\u732b" in shown.getvalue()
