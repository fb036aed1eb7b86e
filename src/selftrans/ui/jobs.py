"""Work that takes longer than an answer: one job at a time in a thread of its own, with progress; it can be cancelled."""

from __future__ import annotations

import secrets
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

from selftrans.messages import first_line, is_own_code

KEPT = 12  #: finished jobs whose pictures are kept
KEPT_BYTES = 128 << 20  #: of the pictures of all jobs


class Busy(Exception):
    """Another job is running; the text is for the page."""


class Cancelled(Exception):
    """The job was asked to end."""


class Job:
    """One piece of work and what it has made so far."""

    def __init__(self, key: int, kind: str, about: dict[str, Any]) -> None:
        self.key, self.kind, self.about = key, kind, about
        self.state, self.error = "running", ""  #: running, done, cancelled or failed
        self.done = self.total = 0
        self.doing = ""  #: what is done at the moment
        self.notes: list[str] = []
        self.results: list[dict[str, Any]] = []
        self.pictures: list[bytes] = []
        self.started = time.monotonic()
        self.seconds: float | None = None  #: that it took, when it has ended
        self.stop = threading.Event()

    def check(self) -> None:
        """Raise Cancelled when the job was asked to end."""
        if self.stop.is_set():
            raise Cancelled

    def advance(self, *_: object) -> None:
        """Count one unit of work; raises as `check`. Takes and ignores what a hook of a module is given."""
        self.check()
        self.done += 1

    def add(self, png: bytes, **about: Any) -> None:
        """Add a finished picture, described by `about`. ValueError where the pictures take more than the page keeps."""
        if sum(map(len, self.pictures)) + len(png) > KEPT_BYTES:
            raise ValueError(f"the pictures take more than {KEPT_BYTES >> 20} MB; ask for fewer, or for fewer steps")
        self.pictures.append(png)
        self.results.append(about | {"picture": len(self.pictures) - 1})

    def shown(self) -> dict[str, Any]:
        """As json types."""
        passed = time.monotonic() - self.started if self.seconds is None else self.seconds
        running = self.state == "running" and 0 < self.done <= self.total
        return {
            "id": self.key,
            "kind": self.kind,
            "about": self.about,
            "state": self.state,
            "error": self.error,
            "doing": self.doing,
            "done": self.done,
            "total": self.total,
            "seconds": round(passed, 1),
            "left": round(passed / self.done * (self.total - self.done), 1) if running else None,
            "notes": list(dict.fromkeys(self.notes)),
            "results": list(self.results),
        }


class Jobs:
    """The jobs of the page: one runs, the last ones are kept."""

    def __init__(self) -> None:
        self._jobs: dict[int, Job] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        #: random start: an address of a picture that a tab keeps from an earlier process must not come again
        self._next = secrets.randbits(48)

    def start(self, kind: str, about: dict[str, Any], work: Callable[[Job], None]) -> Job:
        """Begin `work` in a thread. Busy while another job runs."""
        with self._lock:
            if self._thread is not None and self._thread.is_alive():
                if next(reversed(self._jobs.values())).state == "running":
                    raise Busy("another job is running; wait for it, or cancel it")
                self._thread.join()  # its job has ended, as the page shows already, and it does nothing more
            job = self._jobs[self._next] = Job(self._next, kind, about)
            self._next += 1
            self._forget()
            self._thread = threading.Thread(target=_run, args=(job, work), daemon=True, name=f"job-{job.key}")
            self._thread.start()
        return job

    def get(self, key: int) -> Job:
        """LookupError for a job that is not kept."""
        found = self._jobs.get(key)
        if found is None:
            raise LookupError("there is no such job; its results are no longer kept")
        return found

    def current(self) -> Job | None:
        """The job that runs, or the one that ran last."""
        with self._lock:
            return next(reversed(self._jobs.values()), None)

    def close(self, patience: float = 5.0) -> None:
        """Ask the running job to end, and wait for it as long as that."""
        for job in list(self._jobs.values()):
            job.stop.set()
        if self._thread is not None:
            self._thread.join(patience)

    def _forget(self) -> None:
        """Drop the oldest jobs beyond what is kept."""
        while len(self._jobs) > 1 and (
            len(self._jobs) > KEPT or sum(len(p) for job in self._jobs.values() for p in job.pictures) > KEPT_BYTES
        ):
            del self._jobs[next(iter(self._jobs))]


def _run(job: Job, work: Callable[[Job], None]) -> None:
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                work(job)
            finally:
                job.notes += [first_line(each.message, 300) for each in said if is_own_code(each.filename)]
        job.state = "done"
    except Cancelled:
        job.state = "cancelled"
    except Exception as error:  # whatever a model, a decoder or a file raises: the page says it
        job.state, job.error = "failed", first_line(error, 400)
    finally:
        job.seconds = time.monotonic() - job.started
