"""`prepare` in parts: no shard is made twice, and the files equal those of one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import selftrans.data.prepare as prepare_module
from selftrans.cli.main import main
from selftrans.data import resumable
from selftrans.data.dataset import Dataset
from selftrans.data.prepare import prepare
from tests.support.pictures import class_folders, contents, stopped_after

OPTIONS = {"shard_size": 4, "batch_size": 2, "progress": False}
#: `prepare SOURCE OUT PART` with a delay at each batch, so that the processes overlap
SLOW = (
    "import sys, time; from selftrans.data.prepare import ShardEncoder, prepare\n"
    "decode = ShardEncoder.decode\n"
    "ShardEncoder.decode = lambda self, indices: (time.sleep(0.1), decode(self, indices))[1]\n"
    "prepare(sys.argv[1], sys.argv[2], part=sys.argv[3], shard_size=4, batch_size=2, progress=False)"
)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return class_folders(tmp_path / "my pictures")  # 23 pictures: six shards


@pytest.fixture
def complete(pictures: Path, tmp_path: Path) -> dict[str, bytes]:
    prepare(pictures, tmp_path / "complete", **OPTIONS)  # type: ignore[arg-type]
    return contents(tmp_path / "complete")


def made(out: Path) -> list[str]:
    return sorted(path.name[6:11] for path in out.glob("shard-*.json"))


@pytest.mark.parametrize("parts", [2, 3, 9])  # nine: some parts are empty
def test_parts_in_sequence_make_the_same_folder(
    pictures: Path, tmp_path: Path, complete: dict[str, bytes], parts: int
) -> None:
    out, written = tmp_path / "out", []
    for i in range(parts):
        manifest = prepare(pictures, out, part=f"{i + 1}/{parts}", **OPTIONS)  # type: ignore[arg-type]
        written.append([shard.index for shard in manifest.shards])
        if len(written[-1]) < 6:
            assert not (out / "manifest.json").exists() and made(out) == [f"{k:05d}" for k in written[-1]]
            with pytest.raises(ValueError, match="not prepared or not finished"):
                Dataset.open(out)
    assert [len(shards) for shards in written] == {2: [3, 6], 3: [2, 4, 6], 9: [1, 2, 3, 4, 5, 6, 6, 6, 6]}[parts]
    assert contents(out) == complete
    assert np.array_equal(Dataset.open(out, verify=True).labels, Dataset.open(tmp_path / "complete").labels)


@pytest.mark.slow
def test_concurrent_parts_make_the_same_folder(pictures: Path, tmp_path: Path, complete: dict[str, bytes]) -> None:
    """Two processes at the same time make their own halves of one folder."""
    out = tmp_path / "out"
    pair = [subprocess.Popen([sys.executable, "-c", SLOW, pictures, out, f"{i}/2"]) for i in (1, 2)]
    assert [process.wait() for process in pair] == [0, 0]
    assert contents(out) == complete


def test_killed_part_can_be_repeated(pictures: Path, tmp_path: Path, complete: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    with stopped_after(5):  # inside its second shard
        prepare(pictures, out, part="1/2", **OPTIONS)  # type: ignore[arg-type]
    (out / ".shard-00002.safetensors.1-0.tmp").write_bytes(b"torn")
    (out / ".shard-00003.safetensors.1-0.tmp").write_bytes(b"of another part, which may be running")
    prepare(pictures, out, part="2/2", **OPTIONS)  # type: ignore[arg-type]
    assert made(out) == ["00000", "00001", "00003", "00005"]
    assert [path.name for path in out.glob(".*.tmp")] == [".shard-00002.safetensors.1-0.tmp"]
    prepare(pictures, out, part="1/2", **OPTIONS)  # type: ignore[arg-type]
    assert contents(out) == complete


def test_part_of_a_finished_folder_writes_nothing(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = prepare(pictures, out, **OPTIONS)  # type: ignore[arg-type]
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert prepare(pictures, out, part="2/3", **OPTIONS) == manifest  # type: ignore[arg-type]
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_folder_finished_by_another_part_while_this_one_starts(
    pictures: Path, tmp_path: Path, complete: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other part finishes the folder after this one has read its state and before it has the lock."""
    out = tmp_path / "out"
    prepare(pictures, out, part="1/2", **OPTIONS)  # type: ignore[arg-type]
    run = prepare_module._run

    def late(*args: object, **options: object) -> object:
        monkeypatch.setattr(prepare_module, "_run", run)
        prepare(pictures, out, part="2/2", **OPTIONS)  # type: ignore[arg-type]
        return run(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(prepare_module, "_run", late)
    prepare(pictures, out, part="1/2", **OPTIONS)  # type: ignore[arg-type]
    assert contents(out) == complete


def test_locks_of_parts(pictures: Path, tmp_path: Path) -> None:
    """Different parts run at the same time, the same part does not; a call without parts excludes all others."""
    out = tmp_path / "out"
    with resumable.locked(out, (1, 2), [0, 2, 4]):
        with pytest.raises(ValueError, match=r"is making part 1/2 in .*; wait for it"):
            prepare(pictures, out, part="1/2", **OPTIONS)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="another `selftrans prepare` is writing to"):
            prepare(pictures, out, **OPTIONS)  # type: ignore[arg-type]
        prepare(pictures, out, part="2/2", **OPTIONS)  # type: ignore[arg-type]
        assert made(out) == ["00001", "00003", "00005"]
    with resumable.locked(out), pytest.raises(ValueError, match="another `selftrans prepare` is writing to"):
        prepare(pictures, out, part="1/2", **OPTIONS)  # type: ignore[arg-type]
    prepare(pictures, out, **OPTIONS)  # type: ignore[arg-type]  # without a part, it makes all missing shards
    assert len(Dataset.open(out, verify=True)) == 23


@pytest.mark.parametrize("part", ["2", "0/2", "3/2", "1/0", "a/b", "1/2/3", "-1/2", ""])
def test_impossible_parts_are_refused(pictures: Path, tmp_path: Path, part: str) -> None:
    with pytest.raises(ValueError, match=r"should be I/N with I from 1 to N"):
        prepare(pictures, tmp_path / "out", part=part, **OPTIONS)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_prepare_command_with_parts(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["prepare", str(pictures), "--out", str(tmp_path / "out"), "--shard-size", "4"]
    assert main([*common, "--part", "2/2"]) == 0
    shown = capsys.readouterr()
    assert "3 of 6 shards are finished; the other parts make the rest" in shown.err and "next:" not in shown.out
    assert main([*common, "--part", "1/2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    next_command = f"selftrans train imagefolder --data {tmp_path / 'out'} --out RUN"
    assert lines[0].startswith("23 pictures") and lines[-1] == f"-> {tmp_path / 'out'}; next: {next_command}"
    assert main([*common, "--part", "half"]) == 1
    assert "part 'half' should be I/N" in capsys.readouterr().err
