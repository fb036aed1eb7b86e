"""`selftrans doctor`: what it finds, and how it shows it."""

import errno
import json
import os

import pytest
import torch

from selftrans.cli.main import main
from selftrans.experiments import doctor
from tests.unit.cli.lines import one_line


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(doctor, "_compiled", lambda device: None)
    monkeypatch.setattr(doctor, "CHUNKS", 1)


def test_text_and_json(quick, tmp_path, capsys):
    assert main(["doctor", f"--folder={tmp_path}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["torch"] == torch.__version__ and found["compile"] == "works"
    assert set(found["attention"]) == set(doctor.KERNELS) and found["attention"]["math"] == "works"
    assert found["precisions"]["fp32"] == "works" and len(found["devices"]) == torch.cuda.device_count()
    assert found["disk"]["folder"] == str(tmp_path) and found["disk"]["write"] > 0 and not list(tmp_path.iterdir())
    assert main(["doctor", f"--folder={tmp_path}"]) == 0
    shown = capsys.readouterr().out
    assert f"\ntorch  {' ' * 20}" in shown and torch.__version__ in shown and "MB/s" in shown


def test_failures_are_said(monkeypatch):
    def fail(text):
        raise RuntimeError(text)

    assert doctor.tried(lambda: fail("no compiler\nmore")) == "fails: RuntimeError: no compiler"
    assert doctor.tried(lambda: fail("No viable backend for ...")) == "not available"
    found = {"packages": {"torch": "1", "av": None}, "system": "s", "python": "p", "cpu": "c", "cores": 2}
    found |= {"devices": [{"name": "GPU", "memory": 80 * 2**30, "capability": "9.0", "cuda": "12.8"}]}
    found |= {"precisions": {"fp16": "fails: x"}, "compile": "works", "attention": {"flash": "works"}}
    shown = doctor.text(found | {"disk": {"folder": "/d", "free": 5e9, "write": 2e8, "read": 1}})
    lines = dict(line.split("  ", 1) for line in shown.splitlines())
    assert (
        lines["gpu 0"].strip() == "GPU, 80.0 GiB, capability 9.0, CUDA 12.8" and lines["not installed"].strip() == "av"
    )
    assert lines["disk"].strip() == "5.0 GB free, writes 200 MB/s in /d" and lines["fp16"].strip() == "fails: x"


def test_folder_that_cannot_be_written(tmp_path, capsys):
    assert main(["doctor", f"--folder={tmp_path / 'nowhere'}"]) == 1
    assert "nowhere does not exist; give another --folder" in one_line(capsys)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_disk_that_takes_no_file_is_reported_and_the_rest_is_too(tmp_path, monkeypatch, code):
    def refuse(**_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(doctor.tempfile, "NamedTemporaryFile", refuse)
    disk = doctor.disk_speed(tmp_path)
    assert set(disk) == {"folder", "free", "failed"} and disk["failed"] == os.strerror(code)
    assert doctor._disk(disk).endswith(
        f"GB free, 64 MB cannot be written ({os.strerror(code)}) in {tmp_path.resolve()}"
    )
