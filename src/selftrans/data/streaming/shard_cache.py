"""A folder of fetched files that several processes share: bounded, the least recently used files go first.

    CACHE/<sha256>.safetensors      a file, by the sha256 of its content      CACHE/.lock       held while entries change
    CACHE/.lease-<process>          what a process reads and fetches; it holds a lock on it as long as it lives
A file that a living process reads is never removed. What a killed process left is removed by the next one.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from selftrans.storage import atomic_write, flock, no_symlink

#: environment variables, for commands without the options
DIRECTORY, GIGABYTES = "SELFTRANS_CACHE_DIR", "SELFTRANS_CACHE_GB"
DEFAULT_GB = 100.0
PATIENCE = 600.0  #: seconds that a read waits for others to release files of a full cache
#: seconds after which a lease that cannot be read counts as that of a dead process; if the process lives, at worst files are
#: removed that it has open: it can go on reading them, and they are fetched again later
OLD = 86400.0
REMEDY = "raise --data.cache-gb, or choose another --data.cache-dir"
SUFFIX = ".safetensors"


class CacheOptions(NamedTuple):
    """The folder of fetched files, and their largest total size; None: from the environment, else the default."""

    directory: str | None = None
    gigabytes: float | None = None

    def open(self) -> ShardCache:
        """The cache. ValueError for a folder that cannot be written or locked, and a size that is no number above zero."""
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = self.directory or os.environ.get(DIRECTORY) or Path(home, "selftrans", "data")
        given = self.gigabytes if self.gigabytes is not None else os.environ.get(GIGABYTES, DEFAULT_GB)
        try:
            size = float(given)
        except ValueError:
            size = 0.0
        if not 0 < size < 1e9:
            raise ValueError(f"the size of the cache, {given} GB, should be a number above zero; give --data.cache-gb")
        return ShardCache(Path(folder), int(size * 1e9))


class Lease(NamedTuple):
    """Names of the files that one process reads, and name -> bytes of those that it fetches."""

    reading: set[str]
    fetching: dict[str, int]


class ShardCache:
    """The files of one cache folder, at most `limit` bytes of them. Safe from any thread and process."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._own = Lease(set(), {})
        self._said: set[str] = set()  #: names of leases for which a warning was given
        self._id = f"{os.getpid()}-{secrets.token_hex(4)}"
        path = folder / f".lease-{self._id}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                self._lease = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
                flock(self._lease)
                self._remove_stale(self._others())
        except (OSError, ImportError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(
                f"the cache {folder} cannot be used ({reason}); choose another --data.cache-dir"
            ) from error
        weakref.finalize(self, _end, self._lease, path, os.getpid())

    def hold(self, names: Collection[str]) -> None:
        """Protect exactly these files, besides those being fetched; the others that this process held may be removed."""
        with self._locked():
            for name in self._own.reading - set(names):
                with suppress(OSError):
                    os.utime(self.folder / name)  # it was used until now: the removal order is by this time
            self._own.reading.clear()
            self._own.reading.update(names)
            self._write()

    def obtain(
        self,
        name: str,
        size: int,
        fetch: Callable[[Path], object],
        *,
        wanted: Callable[[], bool] = lambda: True,
        patience: float = PATIENCE,
    ) -> Path | None:
        """The path of a file, which is held from now on; if it is missing, `fetch` writes it to the path that it is given.

        Waits while another thread or process fetches it, and while the cache is full of files that are read. `size`: bytes of
        the file, about. None as soon as it is not `wanted` any more.
        Raises ValueError for a file larger than the cache, after `patience` seconds of a full cache or disk, what `fetch`
        raises, and when it cannot be written.
        """
        path, deadline, pause = self.folder / name, time.monotonic() + patience, 0.02
        while wanted():
            with self._locked():
                others = self._others()
                if path.is_file() and not path.is_symlink():
                    with suppress(OSError):  # of another user
                        os.utime(path)
                    self._own.reading.add(name)
                    self._write()
                    return path
                fetched = name in self._own.fetching or any(name in other.fetching for other in others)
                if not fetched and self._free(size, others):
                    self._own.fetching[name] = size
                    self._own.reading.add(name)
                    self._write()
                    break
            if fetched:
                deadline = time.monotonic() + patience
            elif size > self.limit or time.monotonic() > deadline:
                raise ValueError(f"the cache {self.folder} {self._full(size)}; {REMEDY}")
            time.sleep(pause)
            pause = min(2 * pause, 0.5)
        else:
            return None
        self._fetch(path, name, fetch)
        return path

    def discard(self, name: str) -> None:
        """Remove a damaged file."""
        with self._locked():
            (self.folder / name).unlink(missing_ok=True)

    def _fetch(self, path: Path, name: str, fetch: Callable[[Path], object]) -> None:
        done = False
        try:
            with atomic_write(path, writer=self._id, durable=False, remedy=REMEDY) as file:
                fetch(Path(file.name))
            done = True
        finally:
            with self._locked():
                del self._own.fetching[name]
                if not done:
                    self._own.reading.discard(name)
                self._write()

    def _free(self, size: int, others: list[Lease]) -> bool:
        """Remove files without a reader, least recently used first, until `size` bytes fit; returns whether they do."""
        leases = [self._own, *others]
        held = set().union(*(lease.reading for lease in leases))
        reserved = sum(sum(lease.fetching.values()) for lease in leases)
        files = sorted((about.st_mtime_ns, about.st_size, name) for name, about in self._files())
        left = min(
            self.limit - reserved - sum(length for _, length, _ in files),
            shutil.disk_usage(self.folder).free - reserved,
        )
        removed = []
        for _, length, name in files:
            if left >= size:
                break
            if name not in held:
                left += length
                removed.append(name)
        if left < size:
            return False
        for name in removed:
            (self.folder / name).unlink(missing_ok=True)
        return True

    def _full(self, size: int) -> str:
        """Why `size` bytes do not fit."""
        free = shutil.disk_usage(self.folder).free
        if size > self.limit:
            return f"holds {self.limit / 1e9:.3g} GB, and one file has {size / 1e9:.3g} GB"
        if size > free:
            return f"is on a disk with {free / 1e9:.3g} GB free, and a file has {size / 1e9:.3g} GB"
        return f"is full of files that are read ({self.limit / 1e9:g} GB)"

    def _files(self) -> Iterator[tuple[str, os.stat_result]]:
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.endswith(SUFFIX) and entry.is_file(follow_symlinks=False):
                    yield entry.name, entry.stat(follow_symlinks=False)

    def _others(self) -> list[Lease]:
        """The leases of other living processes (and of other caches of this one); those of dead ones are removed."""
        found = []
        for path in self.folder.glob(".lease-*"):
            if path.name == f".lease-{self._id}" or path.is_symlink() or not path.is_file():
                continue
            try:
                with open(no_symlink(str(path), os.O_RDONLY), encoding="utf-8") as file:
                    if _is_locked(file.fileno()):  # its process lives
                        content = json.loads(file.read() or "[[], {}]")
                        found.append(Lease(set(content[0]), dict(content[1])))
                        continue
                with suppress(OSError):
                    path.unlink(missing_ok=True)
            except FileNotFoundError:
                continue
            except (OSError, ValueError, LookupError, TypeError):
                if not self._is_old(path):
                    found.append(Lease({name for name, _ in self._files()} | {*self._temporaries().values()}, {}))
        return found

    def _is_old(self, path: Path) -> bool:
        """Whether a lease that cannot be read, such as that of another user, has not been written for long.

        Until then its process may live, and read any file: none is removed. It stays, since a process that lives renews it.
        """
        try:
            old = time.time() - path.stat().st_mtime > OLD
        except OSError:  # it has ended meanwhile
            return True
        if old and path.name not in self._said:
            self._said.add(path.name)
            warnings.warn(
                f"{path} cannot be read, and was not written for a day: it is ignored; its owner may remove it",
                stacklevel=6,
            )
        return old

    def _remove_stale(self, others: list[Lease]) -> None:
        """Remove what killed processes were writing: temporary files that no living process fetches."""
        fetched = {name for lease in others for name in (*lease.fetching, *lease.reading)}
        for path, name in self._temporaries().items():
            if name not in fetched:
                path.unlink(missing_ok=True)

    def _temporaries(self) -> dict[Path, str]:
        """Temporary files, and the names that they get."""
        found = self.folder.glob(f".*{SUFFIX}.*.tmp")
        return {path: path.name[1:].partition(SUFFIX)[0] + SUFFIX for path in found}

    def _write(self) -> None:
        text = json.dumps([sorted(self._own.reading), self._own.fetching]).encode()
        os.pwrite(self._lease, text, 0)
        os.ftruncate(self._lease, len(text))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Exclude every other thread and process that uses the folder."""
        descriptor = no_symlink(str(self.folder / ".lock"), os.O_RDWR | os.O_CREAT)
        try:
            flock(descriptor, wait=True)
            try:
                yield
            finally:
                # closing alone leaves it to a process that was forked while it was held
                flock(descriptor, release=True)
        finally:
            os.close(descriptor)


def _is_locked(descriptor: int) -> bool:
    """Whether another holds an exclusive lock on a file that is open for reading."""
    try:
        flock(descriptor, shared=True)  # over NFS an exclusive lock needs a file that is open for writing
    except OSError:
        return True
    return False


def _end(descriptor: int, path: Path, process: int) -> None:
    """Remove the lease of a cache that is no longer used; a forked process, which has a copy of it, does nothing."""
    if os.getpid() == process:
        with suppress(OSError):
            path.unlink(missing_ok=True)
            os.close(descriptor)
