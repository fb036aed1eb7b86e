"""One job at a time, its progress, its end on request, and what is kept of it."""

import threading
import warnings

import pytest

from selftrans.ui import jobs
from selftrans.ui.jobs import Busy, Cancelled, Jobs


def ended(job, found):
    found._thread.join(10)
    return job.shown()


def test_progress_results_and_warnings():
    def work(job):
        job.total = 4
        for _ in range(4):
            job.advance()
        warnings.warn_explicit("said", UserWarning, jobs.__file__, 1)
        warnings.warn_explicit("of a library", UserWarning, "/a/selftrans/.venv/lib/other.py", 1)
        job.add(b"png", count=3)

    found = Jobs()
    assert found.current() is None
    shown = ended(found.start("sample", {"a": 1}, work), found)
    assert shown["state"] == "done" and shown["done"] == 4 and shown["notes"] == ["said"] and shown["left"] is None
    assert shown["results"] == [{"count": 3, "picture": 0}] and found.current().pictures == [b"png"]
    with pytest.raises(LookupError, match="no such job"):
        found.get(99)


def test_a_second_job_is_refused_and_the_first_can_be_cancelled():
    begun, found = threading.Event(), Jobs()

    def endless(job):
        job.total = 10**9
        begun.set()
        while True:
            job.advance()

    job = found.start("sample", {}, endless)
    assert begun.wait(10)
    with pytest.raises(Busy):
        found.start("sample", {}, endless)
    assert job.shown()["state"] == "running"
    found.close(10)
    assert ended(job, found)["state"] == "cancelled"
    with pytest.raises(Cancelled):
        job.check()


def test_a_job_starts_where_the_thread_of_an_ended_one_is_still_alive(monkeypatch):
    released, run = threading.Event(), jobs._run

    def slow_to_end(job, work):
        run(job, work)
        released.wait(10)

    monkeypatch.setattr(jobs, "_run", slow_to_end)
    found = Jobs()
    first = found.start("sample", {}, lambda job: None)
    while first.state == "running":
        pass
    threading.Timer(0.2, released.set).start()
    assert ended(found.start("sample", {}, lambda job: None), found)["state"] == "done"


def test_an_error_is_one_line():
    def fails(job):
        raise RuntimeError("first line\nsecond line")

    found = Jobs()
    shown = ended(found.start("maps", {}, fails), found)
    assert shown["state"] == "failed" and shown["error"] == "first line"


def test_old_jobs_are_dropped(monkeypatch):
    monkeypatch.setattr(jobs, "KEPT", 3)
    found = Jobs()
    made = [ended(found.start("sample", {}, lambda job: job.add(b"x" * 10)), found)["id"] for _ in range(5)]
    assert list(found._jobs) == made[2:]
    monkeypatch.setattr(jobs, "KEPT_BYTES", 15)
    large = ended(found.start("side", {}, lambda job: [job.add(b"x" * 10) for _ in range(2)]), found)
    assert large["state"] == "failed" and large["error"].startswith("the pictures take more than 0 MB; ask for fewer")
    assert len(large["results"]) == 1
    made.append(large["id"])
    last = ended(found.start("sample", {}, lambda job: job.add(b"x" * 10)), found)["id"]
    assert list(found._jobs) in ([made[-1], last], [last])


def test_ids_of_another_process_do_not_come_again():
    """A tab that was open before keeps pictures by their address. Ids are whole numbers in JavaScript, too."""
    ids = [found.start("sample", {}, lambda job: None).key for found in (Jobs() for _ in range(8))]
    assert len(set(ids)) == 8 and max(ids) < 2**53
