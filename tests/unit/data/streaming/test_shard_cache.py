"""The cache that processes share: bounded, least recently used first, nothing removed that is read, leftovers removed."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from selftrans.data.streaming import shard_cache
from selftrans.data.streaming.shard_cache import CacheOptions, ShardCache
from selftrans.storage import no_symlink


def name(letter: str) -> str:
    return letter * 64 + ".safetensors"


def put(cache: ShardCache, letter: str, size: int = 100, **options: float) -> Path | None:
    return cache.obtain(name(letter), size, lambda to: to.write_bytes(letter.encode() * size), **options)  # type: ignore[arg-type]


def kept(folder: Path) -> str:
    return "".join(sorted(path.name[0] for path in folder.glob("*.safetensors")))


def test_least_recently_used_file_goes_first(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 300)
    for age, letter in enumerate("cab"):
        path = put(cache, letter)
        assert path is not None and path.read_text() == letter * 100
        cache.hold([])
        os.utime(path, (age, age))
    put(cache, "c")  # it is there: used now
    cache.hold([])
    put(cache, "d")
    assert kept(tmp_path) == "bcd"
    put(cache, "e", size=150)  # held: d; two must go
    assert kept(tmp_path) == "de" and sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) <= 300


def test_file_that_is_read_is_never_removed(tmp_path: Path) -> None:
    mine, other = ShardCache(tmp_path, 250), ShardCache(tmp_path, 250)
    put(mine, "a")
    put(other, "b")
    with pytest.raises(ValueError, match=r"full of files that are read .*--data.cache-gb"):
        put(other, "c", patience=0.1)
    assert kept(tmp_path) == "ab"
    mine.hold([])
    put(other, "c")
    assert kept(tmp_path) == "bc"


def test_full_cache_waits_for_a_reader_to_end(tmp_path: Path) -> None:
    mine, other = ShardCache(tmp_path, 150), ShardCache(tmp_path, 150)
    put(mine, "a")
    threading.Timer(0.15, lambda: mine.hold([])).start()
    put(other, "b")
    assert kept(tmp_path) == "b"


def test_file_is_fetched_once_by_threads_at_the_same_time(tmp_path: Path) -> None:
    caches, calls = [ShardCache(tmp_path, 1000) for _ in range(2)], []

    def fetch(to: Path) -> None:
        calls.append(to)
        time.sleep(0.05)
        to.write_bytes(b"x")

    threads = [threading.Thread(target=cache.obtain, args=(name("a"), 1, fetch)) for cache in caches for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and kept(tmp_path) == "a"


def test_failed_fetch_leaves_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 1000)

    def broken(to: Path) -> None:
        to.write_bytes(b"half")
        raise ValueError("cut off")

    with pytest.raises(ValueError, match="cut off"):
        cache.obtain(name("a"), 100, broken)
    assert not kept(tmp_path) and not list(tmp_path.glob(".*.tmp"))
    put(cache, "a")
    assert kept(tmp_path) == "a"


def test_what_is_not_wanted_any_more_is_not_waited_for(tmp_path: Path) -> None:
    mine, other = ShardCache(tmp_path, 150), ShardCache(tmp_path, 150)
    put(mine, "a")
    stop = iter([True, True, False])
    assert other.obtain(name("b"), 100, lambda to: None, wanted=lambda: next(stop)) is None


def test_killed_process_leaves_no_lease_and_no_temporary_file(tmp_path: Path) -> None:
    code = f"""
        import os, signal
        from pathlib import Path
        from selftrans.data.streaming.shard_cache import ShardCache
        cache = ShardCache(Path({str(tmp_path)!r}), 250)
        cache.obtain({name("a")!r}, 100, lambda to: to.write_bytes(b"a" * 100))
        cache.obtain({name("b")!r}, 100, lambda to: os.kill(os.getpid(), signal.SIGKILL))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True)
    assert len(list(tmp_path.glob(".lease-*"))) == len(list(tmp_path.glob(".*.tmp"))) == 1
    cache = ShardCache(tmp_path, 250)
    assert len(list(tmp_path.glob(".lease-*"))) == 1 and not list(tmp_path.glob(".*.tmp"))
    put(cache, "c", size=240)
    assert kept(tmp_path) == "c"  # the file "a" has no reader now, so it may be removed


@pytest.mark.parametrize("readable", [True, False])
def test_files_of_other_users_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, readable: bool) -> None:
    mine, theirs = ShardCache(tmp_path, 250), ShardCache(tmp_path, 250)
    mask = os.umask(0)
    os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.glob(".lease-*")} == {0o666 & ~mask}

    def refuse(path: str, flags: int) -> int:
        if ".lease" in path and not (readable and flags == os.O_RDONLY):
            raise PermissionError(13, "Permission denied", path)
        return no_symlink(path, flags)

    monkeypatch.setattr(shard_cache, "no_symlink", refuse)
    put(theirs, "a")
    put(mine, "b")
    mine.hold([])
    if readable:
        put(mine, "c")
        assert kept(tmp_path) == "ac"
        return
    temporary = tmp_path / f".{name('d')}.x.tmp"
    temporary.touch()
    with pytest.raises(ValueError, match="full of files that are read"):
        put(mine, "c", patience=0.05)
    ShardCache(tmp_path, 250)
    assert kept(tmp_path) == "ab" and temporary.exists()
    lease = tmp_path / f".lease-{theirs._id}"
    os.utime(lease, (time.time() - 90000,) * 2)
    with pytest.warns(UserWarning, match="cannot be read, and was not written for a day: it is ignored") as said:
        assert put(mine, "c") and put(mine, "d", size=60)
    assert kept(tmp_path) == "cd" and len(said) == 1 and lease.exists()


@pytest.mark.parametrize("content", ["{", "7", "[]", "{}", "[[1, []], 0]"])
def test_damaged_lease_of_a_living_process_keeps_all_files(tmp_path: Path, content: str) -> None:
    mine, other = ShardCache(tmp_path, 150), ShardCache(tmp_path, 150)
    put(mine, "a")
    mine.hold([])
    (tmp_path / f".lease-{other._id}").write_text(content)
    with pytest.raises(ValueError, match="full of files that are read"):
        put(mine, "b", patience=0.05)
    assert kept(tmp_path) == "a"


def test_file_that_never_fits_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ShardCache(tmp_path, 150)
    with pytest.raises(ValueError, match=r"holds 1.5e-07 GB, and one file has 2e-07 GB; raise --data.cache-gb"):
        put(cache, "a", size=200)
    monkeypatch.setattr(shard_cache.shutil, "disk_usage", lambda folder: SimpleNamespace(free=50))
    with pytest.raises(ValueError, match=r"is on a disk with 5e-08 GB free, and a file has 1e-07 GB"):
        put(cache, "a", patience=0.05)


def test_process_forked_under_the_lock_does_not_keep_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, copies = ShardCache(tmp_path, 100), []

    def copied(path: str, flags: int) -> int:
        copies.append(os.dup(descriptor := no_symlink(path, flags)))  # as a forked process has it
        return descriptor

    with monkeypatch.context() as patch:
        patch.setattr(shard_cache, "no_symlink", copied)
        cache.hold([])
    thread = threading.Thread(target=cache.hold, args=([],), daemon=True)
    thread.start()
    thread.join(2)
    ended = not thread.is_alive()
    os.close(*copies)
    assert ended


def test_closed_cache_leaves_no_lease(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 100)
    put(cache, "a", size=10)
    del cache
    assert not list(tmp_path.glob(".lease-*")) and kept(tmp_path) == "a"


def test_place_and_size_by_options_environment_and_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    for variable in ("SELFTRANS_CACHE_DIR", "SELFTRANS_CACHE_GB"):
        monkeypatch.delenv(variable, raising=False)
    cache = CacheOptions().open()
    assert (cache.folder, cache.limit) == (tmp_path / "home" / "selftrans" / "data", 100 * 10**9)
    monkeypatch.setenv("SELFTRANS_CACHE_DIR", str(tmp_path / "b"))
    monkeypatch.setenv("SELFTRANS_CACHE_GB", "0.5")
    cache = CacheOptions().open()
    assert (cache.folder, cache.limit) == (tmp_path / "b", 500_000_000)
    assert CacheOptions(str(tmp_path / "c"), 2.0).open().folder == tmp_path / "c"


@pytest.mark.parametrize("size", ["-1", "0", "many", "nan", "inf"])
def test_wrong_size_is_refused(tmp_path: Path, size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELFTRANS_CACHE_GB", size)
    with pytest.raises(ValueError, match=f"size of the cache, {size} GB, should be a number above zero"):
        CacheOptions(str(tmp_path)).open()


def test_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"the cache .*file cannot be used .*--data.cache-dir"):
        CacheOptions(str(tmp_path / "file")).open()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / ".lock").symlink_to(tmp_path / "target")
    with pytest.raises(ValueError, match="cannot be used"):
        CacheOptions(str(tmp_path / "linked")).open()
    assert not (tmp_path / "target").exists()
