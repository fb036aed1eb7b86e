"""Atomic writes, locks and hashes, checked by the resulting files."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from selftrans import storage
from selftrans.storage import (
    InUse,
    atomic_directory,
    atomic_write,
    check_writable,
    lock_file,
    no_symlink,
    remove_stale_temporaries,
    sha256_file,
    temporary_for,
    write_json,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def run(code: str, *arguments: object) -> subprocess.Popen:
    """Start another process, and wait for its first line of output."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], **pipes, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n", process.communicate()[1]
    return process


# ---- atomic writes


def test_atomic_write_replaces_the_file_and_leaves_no_temporary(tmp_path):
    path = tmp_path / "new" / "folder" / "x.bin"
    for content in (b"one", b"two"):
        with atomic_write(path) as file:
            file.write(content)
            assert names(path.parent)[0] == Path(file.name).name and file.name.endswith(".tmp")
        assert path.read_bytes() == content and names(path.parent) == ["x.bin"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_error_in_the_block_keeps_the_old_file(tmp_path, error):
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(error), atomic_write(tmp_path / "x") as file:  # noqa: PT012 - the block is under test
        file.write(b"half")
        raise error
    assert (tmp_path / "x").read_bytes() == b"old" and names(tmp_path) == ["x"]


def test_kill_between_write_and_rename_keeps_the_old_file(tmp_path):
    (tmp_path / "x").write_bytes(b"old")
    code = (
        "import sys, time; from pathlib import Path; from selftrans import storage\n"
        "def stall(path): print('ready', flush=True); time.sleep(600)\n"
        "storage.sync = stall\n"
        "storage.write_text(Path(sys.argv[1]), 'new')"
    )
    process = run(code, tmp_path / "x")
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert (tmp_path / "x").read_bytes() == b"old"
    (left,) = [path for path in tmp_path.iterdir() if path.name != "x"]
    assert left.read_bytes() == b"new" and left.match(f".x.{storage.MACHINE}-{process.pid}-*.tmp")
    write_text(tmp_path / "x", "newer")
    assert (tmp_path / "x").read_text() == "newer"
    remove_stale_temporaries(tmp_path)
    assert names(tmp_path) == ["x"]


def test_file_is_on_the_disk_before_it_is_renamed(tmp_path, monkeypatch):
    order: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda d: order.append(os.readlink(f"/proc/self/fd/{d}")) or fsync(d))
    monkeypatch.setattr(Path, "replace", lambda self, target: order.append("rename") or replace(self, target))
    write_text(tmp_path / "x", "1")
    assert order[0].endswith(".tmp") and order[1:] == ["rename", str(tmp_path)]
    order.clear()
    with atomic_write(tmp_path / "y", durable=False) as file:
        file.write(b"1")
    assert order == ["rename"]


@pytest.mark.parametrize("place", ["target", "temporary"])
@pytest.mark.parametrize("dangling", [False, True])
def test_symlinks_are_replaced_not_followed(tmp_path, place, dangling):
    mine, path = tmp_path / "mine", tmp_path / "out" / "x"
    path.parent.mkdir()
    if not dangling:
        mine.write_bytes(b"mine")
    (path if place == "target" else temporary_for(path, "a")).symlink_to(mine)
    with atomic_write(path, writer="a") as file:
        file.write(b"new")
    assert names(path.parent) == ["x"] and not path.is_symlink() and path.read_bytes() == b"new"
    assert not mine.exists() if dangling else mine.read_bytes() == b"mine"


def test_symlink_that_appears_at_the_temporary_is_not_followed(tmp_path, monkeypatch):
    (tmp_path / "mine").write_bytes(b"mine")
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
    temporary_for(tmp_path / "x", "a").symlink_to(tmp_path / "mine")
    with pytest.raises(ValueError, match="x cannot be written"), atomic_write(tmp_path / "x", writer="a") as file:
        file.write(b"new")
    assert (tmp_path / "mine").read_bytes() == b"mine" and not (tmp_path / "x").exists()


def test_full_disk_is_one_line_with_the_path_and_the_remedy(tmp_path, monkeypatch):
    (tmp_path / "x").write_text("old")

    def refuse(code):
        raise OSError(code, os.strerror(code))

    def full(path):
        refuse(errno.ENOSPC)

    monkeypatch.setattr(storage, "sync", full)
    with pytest.raises(ValueError, match="cannot be written") as raised:
        write_text(tmp_path / "x", "new")
    remedy = "free disk space or choose another folder"
    assert str(raised.value) == f"{tmp_path / 'x'} cannot be written (No space left on device); {remedy}"
    monkeypatch.setattr(storage, "sync", lambda _: refuse(errno.EROFS))
    with pytest.raises(ValueError, match=r"x cannot be written \(Read-only file system\); choose another folder$"):
        write_text(tmp_path / "x", "new")
    monkeypatch.setattr(storage, "sync", full)
    assert (tmp_path / "x").read_text() == "old" and names(tmp_path) == ["x"]
    with (
        pytest.raises(ValueError, match=r"; repeat the command$"),
        atomic_write(tmp_path / "y", remedy="repeat the command"),
    ):
        pass


def test_full_device_fails_when_the_file_is_closed(tmp_path, monkeypatch):
    """On a full device the error is raised when the file is closed, not when it is written to."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    monkeypatch.setattr(Path, "open", lambda self, mode: open("/dev/full", "wb"))  # noqa: SIM115
    with (
        pytest.raises(ValueError, match="No space left"),
        atomic_write(tmp_path / "x") as file,
    ):
        file.write(b"new")
    assert names(tmp_path) == []


def test_unchanged_text_is_not_rewritten(tmp_path):
    write_json(tmp_path / "x.json", {"a": 1})
    before = (tmp_path / "x.json").stat()
    assert (tmp_path / "x.json").read_text() == '{\n  "a": 1\n}'
    write_json(tmp_path / "x.json", {"a": 1})
    after = (tmp_path / "x.json").stat()  # reading it may have changed its time of access
    assert (after.st_ino, after.st_mtime_ns, after.st_ctime_ns) == (
        before.st_ino,
        before.st_mtime_ns,
        before.st_ctime_ns,
    )
    write_json(tmp_path / "x.json", {"a": 2})
    assert (tmp_path / "x.json").stat().st_ino != before.st_ino
    (tmp_path / "link").symlink_to(tmp_path / "x.json")
    write_json(tmp_path / "link", {"a": 2})  # equal content, but through a symbolic link
    assert not (tmp_path / "link").is_symlink()


def test_concurrent_writers_of_one_file_do_not_share_a_temporary(tmp_path):
    with atomic_write(tmp_path / "x") as one, atomic_write(tmp_path / "x") as other:
        one.write(b"one")
        other.write(b"other")
    assert (tmp_path / "x").read_bytes() == b"one" and names(tmp_path) == ["x"]


def test_named_writer_replaces_its_stale_temporary(tmp_path):
    temporary_for(tmp_path / "x", 3).write_bytes(b"of a killed process")
    with atomic_write(tmp_path / "x", writer=3) as file:
        file.write(b"new")
    assert names(tmp_path) == ["x"] and (tmp_path / "x").read_bytes() == b"new"


def test_permissions_are_those_of_an_ordinary_file(tmp_path):
    (tmp_path / "ordinary").write_bytes(b"")
    write_text(tmp_path / "x", "1")
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


# ---- directories


def test_directory_appears_complete_or_not_at_all(tmp_path):
    out = tmp_path / "a" / "out"
    with pytest.raises(RuntimeError), atomic_directory(out) as directory:  # noqa: PT012
        (directory / "x").write_text("half")
        raise RuntimeError
    assert names(tmp_path) == []
    with atomic_directory(out) as directory:
        (directory / "sub").mkdir()
        (directory / "sub" / "x").write_text("1")
        assert not out.exists()
    assert names(out.parent) == ["out"] and (out / "sub" / "x").read_text() == "1"


def test_directory_that_cannot_be_made_is_named_and_not_its_temporary(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Not a directory") as error, atomic_directory(tmp_path / "file" / "out"):
        pass
    assert error.value.filename == str(tmp_path / "file" / "out")


@pytest.mark.parametrize("kind", [OSError, ValueError])
def test_errors_while_a_directory_is_written_name_it_and_not_its_temporary(kind, tmp_path):
    out = tmp_path / "out"

    def failing(path):
        raise OSError(errno.ENOSPC, "full", str(path)) if kind is OSError else ValueError(f"{path} is too large")

    with pytest.raises(kind) as error, atomic_directory(out) as directory:
        failing(directory / "sub" / "x")
    assert str(out / "sub" / "x") in str(error.value) and ".tmp" not in str(error.value) and names(tmp_path) == []


def test_directory_replaces_another_only_when_asked(tmp_path):
    (tmp_path / "out").mkdir()
    with atomic_directory(tmp_path / "out") as directory:  # an empty directory may be replaced
        (directory / "old").write_text("1")
    with pytest.raises(OSError, match="not empty"), atomic_directory(tmp_path / "out"):
        pass
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["old"]
    with atomic_directory(tmp_path / "out", replace=True) as directory:
        (directory / "new").write_text("1")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["new"]


def test_directory_replaces_a_symlink_without_following_it(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("mine")
    (tmp_path / "out").symlink_to(tmp_path / "mine")
    with atomic_directory(tmp_path / "out", replace=True) as directory:
        (directory / "y").write_text("1")
    assert names(tmp_path / "mine") == ["x"] and names(tmp_path / "out") == ["y"]


@pytest.mark.parametrize(
    ("owner", "name", "number", "message"),
    [
        pytest.param(storage, "sync", errno.ENOSPC, "No space left", id="full disk"),
        pytest.param(Path, "replace", errno.EIO, "output error", id="it cannot be put in its place"),
    ],
)
def test_failed_write_keeps_the_old_directory(tmp_path, monkeypatch, owner, name, number, message):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("old")

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(OSError, match=message), atomic_directory(tmp_path / "out", replace=True) as directory:
        (directory / "x").write_text("new")
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "x").read_text() == "old"


def test_directory_is_never_half_removed_when_it_is_replaced(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("old")
    seen = []
    monkeypatch.setattr(storage, "_remove", lambda path: seen.append((tmp_path / "out" / "x").read_text()))
    with atomic_directory(tmp_path / "out", replace=True) as directory:
        (directory / "x").write_text("new")
    assert seen == ["new"]


def test_temporary_directory_of_a_killed_process_is_removed_by_the_next_call(tmp_path):
    """One that another process is writing stays, and so does what belongs to another name."""
    other = f".out.b.{storage.MACHINE}-1-0123abcd.tmp"
    for name in (f".out.{storage.MACHINE}-1-0123abcd.tmp", other, ".out.mine.tmp"):
        (tmp_path / name / "sub").mkdir(parents=True)
    with atomic_directory(tmp_path / "out", replace=True) as slow:
        with atomic_directory(tmp_path / "out", replace=True) as directory:
            assert names(tmp_path) == sorted([other, ".out.mine.tmp", slow.name, directory.name])
    assert names(tmp_path) == [other, ".out.mine.tmp", "out"]


def test_temporaries_of_another_machine_are_removed_a_day_after_their_last_change(tmp_path):
    """It may be writing them: there are file systems whose locks hold on one machine only."""
    folder, file = (tmp_path / f".{name}.89abcdef-1-0123abcd.tmp" for name in ("out", "x"))
    (folder / "sub").mkdir(parents=True)
    written = folder / "sub" / "weights"
    for path in (written, file):
        path.touch()

    def clean():
        with atomic_directory(tmp_path / "out", replace=True):
            pass
        remove_stale_temporaries(tmp_path, "x", shared=True)

    clean()
    assert written.exists() and file.exists()
    for path in (folder, folder / "sub", file):
        os.utime(path, (0, time.time() - 25 * 3600))
    clean()
    assert written.exists() and not file.exists()
    os.utime(written, (0, time.time() - 25 * 3600))
    clean()
    assert names(tmp_path) == ["out"]
    file.touch()
    remove_stale_temporaries(tmp_path, "x")  # under a lock that holds everywhere
    assert names(tmp_path) == ["out"]


def test_failed_write_leaves_no_new_folders(tmp_path):
    (tmp_path / "old").mkdir()
    for folder in ("old", "a/b"):
        with pytest.raises(KeyError), atomic_write(tmp_path / folder / "x"):
            raise KeyError
    assert names(tmp_path) == ["old"]


def test_folder_whose_name_is_not_utf8_is_refused_before_it_is_made(tmp_path):
    """safetensors writes files there, but cannot open them."""
    out = tmp_path / os.fsdecode(b"bad\xff")
    with pytest.raises(ValueError, match="is not UTF-8"), lock_file(out / ".lock"):
        pass
    assert not out.exists()


def test_temporary_directory_without_a_machine_in_its_name_is_removed(tmp_path):
    """Earlier versions named only the process."""
    (tmp_path / ".run.123-0123abcd.tmp").mkdir()
    with atomic_directory(tmp_path / "run"):
        pass
    assert names(tmp_path) == ["run"]


def test_stale_temporaries_are_removed_by_target(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("mine")
    folder = tmp_path / "folder"
    folder.mkdir()
    temporary_for(folder / "x.json").write_text("")
    temporary_for(folder / "step-3").mkdir()
    (temporary_for(folder / "step-3", "b")).symlink_to(tmp_path / "mine")
    for kept in ("x.json", ".x.json", ".lock", "a.tmp"):
        (folder / kept).write_text("")
    remove_stale_temporaries(folder, "step-*")
    assert len(names(folder)) == 5
    remove_stale_temporaries(folder)
    assert names(folder) == [".lock", ".x.json", "a.tmp", "x.json"] and names(tmp_path / "mine") == ["x"]
    temporary_for(tmp_path / "mine" / "y").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    remove_stale_temporaries(tmp_path / "link")
    remove_stale_temporaries(tmp_path / "absent")
    assert len(names(tmp_path / "mine")) == 2


# ---- locks

HOLD = (
    "import sys; from pathlib import Path; from selftrans.storage import lock_file\n"
    "with lock_file(Path(sys.argv[1]), shared=sys.argv[2] == 'shared'): print('ready', flush=True); sys.stdin.read()"
)


def test_second_process_is_refused_and_the_owner_named(tmp_path):
    lock = tmp_path / "run" / ".lock"
    process = run(HOLD, lock, "alone")
    try:
        with pytest.raises(InUse) as raised, lock_file(lock):
            pass
        assert str(raised.value) == (
            f"{tmp_path / 'run'} is in use by process {process.pid}; wait for it, or choose another --out"
        )
        with pytest.raises(InUse), lock_file(lock, shared=True):
            pass
    finally:
        process.kill()  # the system releases it
        process.wait()
    with lock_file(lock):
        assert lock.read_text() == str(os.getpid())


def test_shared_locks_exclude_only_exclusive_ones(tmp_path):
    process = run(HOLD, tmp_path / ".lock", "shared")
    try:
        with lock_file(tmp_path / ".lock", shared=True):
            pass
        with pytest.raises(InUse, match=r"in use by process \?;"), lock_file(tmp_path / ".lock"):
            pass
    finally:
        process.kill()
        process.wait()


def test_waiting_for_a_lock_ends_when_it_is_free(tmp_path):
    process, released = run(HOLD, tmp_path / ".lock", "alone"), threading.Event()

    def release() -> None:
        released.set()
        process.stdin.close()

    threading.Timer(0.2, release).start()
    with lock_file(tmp_path / ".lock", wait=True):
        assert released.is_set()
    assert process.wait() == 0


def test_lock_that_is_a_symlink_is_refused(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".lock").symlink_to(tmp_path / "mine")
    with (
        pytest.raises(ValueError, match=r"cannot be opened \(.*symbolic links\); remove it"),
        lock_file(tmp_path / ".lock"),
    ):
        pass
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize(("number", "there"), [(errno.EROFS, True), (errno.EACCES, False)])
def test_lock_that_cannot_be_made_is_not_said_to_be_removable(number, there, tmp_path, monkeypatch):
    def refuse(path, flags):
        raise OSError(number, os.strerror(number), path)

    if there:
        (tmp_path / ".lock").touch()
    monkeypatch.setattr(storage, "no_symlink", refuse)
    with (
        pytest.raises(ValueError, match=r".lock cannot be opened \([\w -]+\); choose another"),
        lock_file(tmp_path / ".lock"),
    ):
        pass


def test_file_system_without_locks_warns(tmp_path, monkeypatch):
    def none(file, how):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", none)
    entered = False
    with (
        pytest.warns(UserWarning, match=r"cannot be locked \(Function not implemented\)"),
        lock_file(tmp_path / ".lock"),
    ):
        entered = True
    assert entered


def test_opener_follows_no_symlink(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="symbolic links"), open(tmp_path / "link", "ab", opener=no_symlink):
        pass
    with open(tmp_path / "new", "ab", opener=no_symlink) as file:
        file.write(b"1")
    assert (tmp_path / "new").read_bytes() == b"1"


# ---- hashes


def test_hash_of_a_file_equals_that_of_its_bytes(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_file(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(tmp_path / "x") == hashlib.sha256(b"abc").hexdigest()


# ---- what a refused command leaves


def refused(folder: Path, *, begun: bool = False) -> None:
    """A command that makes files in `folder` and is refused, before or after it has written config.json."""
    new = [path for path in (folder / "data", folder / ".lock") if not path.exists()]
    with lock_file(folder / ".lock"), storage.removed_if_refused(new, keep=folder / "config.json"):
        (folder / "data" / "deep").mkdir(parents=True, exist_ok=True)
        (folder / "data" / "deep" / "file").write_text("new")
        if begun:
            (folder / "config.json").write_text("{}")
        raise ValueError("refused")


def test_refused_command_leaves_what_was_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="refused"):
        refused(tmp_path / "new" / "run")
    assert not names(tmp_path)
    (tmp_path / "there" / "data").mkdir(parents=True)
    (tmp_path / "there" / "data" / "mine").write_text("mine")
    with pytest.raises(ValueError, match="refused"):
        refused(tmp_path / "there")
    assert sorted(path.name for path in (tmp_path / "there").rglob("*")) == ["data", "deep", "file", "mine"]
    with pytest.raises(ValueError, match="refused"):
        refused(tmp_path / "begun", begun=True)
    assert {".lock", "config.json", "data"} == {path.name for path in (tmp_path / "begun").iterdir()}


@pytest.mark.parametrize("shared", [False, True])
def test_failed_command_leaves_no_new_folder_with_a_lock_alone(tmp_path: Path, shared: bool) -> None:
    (tmp_path / "old").mkdir()
    for folder in ("old", "a/new", "begun"):
        with pytest.raises(KeyError), lock_file(tmp_path / folder / ".lock", shared=shared):  # noqa: PT012
            if folder == "begun":
                (tmp_path / folder / "x").touch()
            raise KeyError
    left = ["begun", "begun/.lock", "begun/x", "old", "old/.lock"]
    left += ["a", "a/new", "a/new/.lock"] if shared else []  # of which another process may have the lock, too
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == sorted(left)


@pytest.mark.parametrize("made_anew", [False, True])
def test_lock_that_its_owner_removes_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made_anew: bool
) -> None:
    lock = tmp_path / ".lock"

    def removed_meanwhile(descriptor: int, operation: int) -> None:
        lock.unlink()
        if made_anew:  # by a third process, whose lock is another
            lock.touch()

    monkeypatch.setattr(fcntl, "flock", removed_meanwhile)
    with pytest.raises(InUse), lock_file(lock):
        pass


def test_a_lock_that_is_removed_is_waited_for_anew(tmp_path, monkeypatch):
    """As parts of `prepare` do: the last of them removes the locks, while another waits."""
    lock, flock, calls = tmp_path / "out" / ".lock", fcntl.flock, []

    def removed_once(descriptor: int, operation: int) -> None:
        calls.append(operation)
        flock(descriptor, operation)
        if len(calls) == 1:
            lock.unlink()
            lock.parent.rmdir()

    monkeypatch.setattr(fcntl, "flock", removed_once)
    with lock_file(lock, wait=True):
        assert lock.read_text() == str(os.getpid()) and calls == [fcntl.LOCK_EX] * 2


def test_path_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("x")
    check_writable(tmp_path / "new" / "a.json")
    check_writable(tmp_path / "file")
    assert not (tmp_path / "new").exists()
    for path, why in ((tmp_path, "it is a folder"), (tmp_path / "file" / "b" / "a.json", "file is not a folder")):
        with pytest.raises(ValueError, match=f"cannot be written .*{why}.; choose another path"):
            check_writable(path)


def test_a_full_disk_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9 - 70_000, 70_000))
    check_writable(tmp_path / "new" / "a.json")
    with pytest.raises(
        ValueError, match=r"a.bin cannot be written \(70 kB free, 1 MB needed\); free disk space or choose"
    ):
        check_writable(tmp_path / "new" / "a.bin", size=10**6)


def test_lock_is_held_on_a_full_disk(tmp_path, monkeypatch):
    def full(descriptor, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with lock_file(tmp_path / ".lock"), pytest.raises(InUse), lock_file(tmp_path / ".lock"):
        pass


def test_a_folder_without_permission_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda folder, mode: folder != tmp_path)  # permissions do not bind root
    with pytest.raises(ValueError, match="does not allow it"):
        check_writable(tmp_path / "new" / "a.json")
