"""The application behind the page: its addresses, and how errors are answered. See `serve` for the process."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from selftrans.device import default_device
from selftrans.messages import first_line
from selftrans.ui.contained import JsonFiles
from selftrans.ui.feature_job import UPLOAD_BYTES, features
from selftrans.ui.found_runs import Folders
from selftrans.ui.guard import Guard
from selftrans.ui.jobs import Busy, Jobs
from selftrans.ui.models_of_runs import ModelCache, available_models
from selftrans.ui.run_state import PICTURE_BYTES, RunState
from selftrans.ui.sampling_jobs import playground, preview_differences, side_by_side
from selftrans.ui.tables import distances, measured_tables, stored_table

MOST_BODY = 2 * UPLOAD_BYTES
MOST_RUNS = 8  #: next to each other
STATIC = Path(__file__).parent / "static"  #: the page itself


class Page:
    """Everything that the page knows of its folders. Reading is done by one request at a time."""

    def __init__(self, folders: Sequence[Path], *, device: torch.device | None = None) -> None:
        """ValueError for a folder that does not exist."""
        self.folders, self.files, self.jobs = Folders(folders), JsonFiles(), Jobs()
        self.models = ModelCache(device or default_device())
        self._states: dict[str, RunState] = {}
        self._lock = threading.RLock()

    def run(self, key: str) -> RunState:
        """The run of this id. LookupError where there is none."""
        with self._lock:
            found = self.folders.run(key)
            known = self._states.get(key)
            if known is None or known.found != found:
                known = self._states[key] = RunState(found, self.files)
            return known

    def runs(self) -> dict[str, Any]:
        """The list of runs."""
        with self._lock:
            listing = self.folders.listing()
            for gone in self._states.keys() - listing.runs.keys():
                del self._states[gone]
            self.files.keep({found.place for found in (*listing.runs.values(), *listing.tables.values())})
            return {
                "folders": [str(root) for root in self.folders.roots],
                "notes": list(listing.notes),
                "runs": [self.run(key).summary() for key in listing.runs],
                "tables": len(listing.tables),
                "device": str(self.models.device),
            }

    def detail(self, key: str) -> dict[str, Any]:
        """All about one run."""
        with self._lock:
            state = self.run(key)
            return state.detail() | {"models": available_models(state, self._all_runs())}

    def _all_runs(self) -> list[RunState]:
        return [self.run(key) for key in self.folders.listing().runs]

    def side(self, keys: Sequence[str]) -> dict[str, Any]:
        """Runs next to each other: their last stages, what can be compared, and measured distances."""
        if not 1 <= len(keys) <= MOST_RUNS:
            raise ValueError(f"choose 1 to {MOST_RUNS} runs")
        with self._lock:
            states = [self.run(key) for key in keys]
            shown = []
            for state in states:
                names = state.read().stages
                parts = {n: {"previews": state.previews(n), "checkpoints": state.checkpoints(n)} for n in names}
                shown.append(state.summary() | {"parts": parts})
            return {"runs": shown, "differences": preview_differences(states), "distances": distances(states)}

    def tables(self) -> dict[str, Any]:
        """All comparisons."""
        with self._lock:
            found = self.folders.listing().tables.values()
            stored = [stored_table(each, self.files) for each in found]
            return {"tables": stored + measured_tables(self._all_runs(), {each.place for each in found})}

    def preview(self, key: str, stage: int, step: int) -> bytes:
        """The picture of a step. LookupError, OSError where there is none."""
        with self._lock:
            state = self.run(key)
            names = state.read().stages
        if not 0 <= stage < len(names) or step < 0:
            raise LookupError("there is no such stage")
        content = state.preview(names[stage], step).read(PICTURE_BYTES)
        if not content.startswith(b"\x89PNG\r\n\x1a\n"):
            raise LookupError("the preview is no png")
        return content

    def begin(self, raw: Any) -> dict[str, Any]:
        """Start a job. ValueError or LookupError for a wrong request, Busy while another runs."""
        if not isinstance(raw, dict):
            raise ValueError("a job is a json object")
        kinds: dict[str, Callable[..., Any]] = {
            "sample": playground,
            "side": side_by_side,
            "maps": partial(features, roots=self.folders.roots),
        }
        kind = str(raw.get("kind"))
        if kind not in kinds:
            raise ValueError("the kind of a job is sample, side or maps")
        with self._lock:
            about, work = kinds[kind](raw, self.run, self.models)
        return self.jobs.start(kind, about, work).shown()


def application(page: Page, *, host: str = "127.0.0.1", token: str | None = None) -> Starlette:
    """The ASGI application of a page; it guards itself, see `Guard`."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> Any:
        yield
        await run_in_threadpool(page.jobs.close)

    async def start(request: Request) -> Response:
        try:
            raw = json.loads(await _body(request))
        except RecursionError as error:
            raise ValueError("the request is nested too deeply") from error
        return _json(await run_in_threadpool(page.begin, raw))

    async def cancel(request: Request) -> Response:
        job = page.jobs.get(request.path_params["key"])
        job.stop.set()
        return _json(job.shown())

    async def last_job(request: Request) -> Response:
        job = page.jobs.current()
        return _json(job.shown() if job else None)

    async def job_picture(request: Request) -> Response:
        job, number = page.jobs.get(request.path_params["key"]), request.path_params["number"]
        if number >= len(job.pictures):
            raise LookupError("there is no such picture")
        return _png(job.pictures[number])

    def preview(request: Request) -> Response:
        try:
            return _png(page.preview(*(request.path_params[name] for name in ("key", "stage", "step"))))
        except OSError as error:
            raise LookupError("there is no such preview") from error

    routes = [
        Route("/api/runs", _fresh(lambda request: page.runs())),
        Route("/api/runs/{key:str}", _fresh(lambda request: page.detail(request.path_params["key"]))),
        Route("/api/runs/{key:str}/previews/{stage:int}/{step:int}.png", preview),
        Route("/api/side", _fresh(lambda request: page.side(request.query_params.getlist("run")))),
        Route("/api/tables", _fresh(lambda request: page.tables())),
        Route("/api/jobs", last_job),
        Route("/api/jobs", start, methods=["POST"]),
        Route("/api/jobs/{key:int}/cancel", cancel, methods=["POST"]),
        Route("/api/jobs/{key:int}/pictures/{number:int}.png", job_picture),
        Route("/", lambda request: FileResponse(STATIC / "index.html")),
        Mount("/", StaticFiles(directory=STATIC, follow_symlink=True)),  # installers may link files
    ]
    errors: dict[Any, Any] = {ValueError: _error(400), LookupError: _error(404), Busy: _error(409)}
    middleware = [Middleware(Guard, host=host, token=token), Middleware(GZipMiddleware, minimum_size=2048)]
    return Starlette(routes=routes, exception_handlers=errors, middleware=middleware, lifespan=lifespan)


def _fresh(answer: Callable[[Request], Any]) -> Callable[[Request], Response]:
    """Json that a browser keeps: asked for again while nothing has changed, it is not sent again."""

    def endpoint(request: Request) -> Response:
        found = _json(answer(request))
        tag = f'"{hashlib.sha256(found.body).hexdigest()[:24]}"'
        found.headers.update({"ETag": tag, "Cache-Control": "no-cache"})
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers={"ETag": tag, "Cache-Control": "no-cache"})
        return found

    return endpoint


async def _body(request: Request) -> bytes:
    """The content of a request. ValueError where it is too large."""
    content = bytearray()
    async for piece in request.stream():
        content += piece
        if len(content) > MOST_BODY:
            raise ValueError(f"the request is larger than {MOST_BODY >> 20} MB")
    return bytes(content)


def _json(content: Any, status: int = 200) -> Response:
    """An answer in ASCII: texts of files and requests may hold what UTF-8 does not."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return Response(text, status, media_type="application/json")


def _png(content: bytes) -> Response:
    return Response(content, media_type="image/png", headers={"Cache-Control": "private, max-age=60"})


def _error(status: int) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def answer(request: Request, error: Exception) -> Response:
        text = str(error.args[0]) if isinstance(error, LookupError) and error.args else error
        return _json({"error": first_line(text, 400)}, status)

    return answer
