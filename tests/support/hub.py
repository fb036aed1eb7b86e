"""A stand-in for the hub on a loopback address: what huggingface_hub needs to create a repository, upload and download."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants, file_download, utils

TOKEN = "hf_secretsecretsecret"
REPOSITORY = r"(?P<repository>[\w.-]+/[\w.-]+)"


class Repository:
    """Commits, each the files by name; the last one is main."""

    def __init__(self, private: bool = False) -> None:
        self.private, self.gated = private, False
        self.commits: dict[str, dict[str, bytes]] = {}
        self.uploaded: list[list[str]] = []  #: names of the files that each commit was sent
        self.commit({".gitattributes": b""})

    def commit(self, files: dict[str, bytes]) -> str:
        name = hashlib.sha1(f"{len(self.commits)}".encode()).hexdigest()
        self.commits[name] = files
        return name

    @property
    def sha(self) -> str:
        return [*self.commits][-1]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.sha]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        sha = self.sha if revision == "main" else revision
        return (sha, self.commits[sha]) if sha in self.commits else None


class Hub:
    """The repositories by name, and what was asked of the server."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.large: dict[str, bytes] = {}  #: sha256 -> content of files that are uploaded apart from a commit
        self.apart = False  #: whether safetensors are
        self.broken = ""  #: requests that contain this fail with status 500


def blob(content: bytes) -> str:
    """The name of a file's content in git."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Answers requests from `hub`."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, value: Any = None, status: int = 200, *, body: bytes | None = None, **headers: str) -> None:
        content = json.dumps(value).encode() if body is None else body
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._route(f"POST {unquote(urlsplit(self.path).path)}", body)

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.large[hashlib.sha256(content).hexdigest()] = content
        self.answer({})

    def do_GET(self) -> None:
        self._route(f"GET {unquote(urlsplit(self.path).path)}", b"")

    def do_HEAD(self) -> None:
        self._route(f"GET {unquote(urlsplit(self.path).path)}", b"")

    def _route(self, request: str, body: bytes) -> None:
        self.hub.requests.append(request)
        if self.hub.broken and self.hub.broken in request:
            self.answer({"error": f"broken, with token {TOKEN}"}, 500)
            return
        if request == "POST /api/repos/create":
            self._create(json.loads(body))
        elif request == "POST /api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif found := re.fullmatch(rf"POST /{REPOSITORY}\.git/info/lfs/objects/batch", request):
            self._batch(json.loads(body))
        elif found := re.fullmatch(
            rf"(POST|GET) /api/models/{REPOSITORY}(/(?P<what>\w+)(/(?P<revision>[^/]+))?)?", request
        ):
            self._model(found["repository"], found["what"] or "revision", found["revision"] or "main", body)
        elif found := re.fullmatch(rf"GET /{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", request):
            self._file(found["repository"], found["revision"], found["file"])
        else:
            self.answer({"error": f"no such page: {request}"}, 404)

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid username or password."}, 401)
        elif name in self.hub.repositories:
            self.answer(
                {"error": "You already created this model repo", "url": f"http://{self.headers['Host']}/{name}"}, 409
            )
        else:
            self.hub.repositories[name] = Repository(bool(asked.get("private")) or asked.get("visibility") == "private")
            self.answer({"url": f"http://{self.headers['Host']}/{name}", "id": name})

    def _found(self, name: str, revision: str) -> tuple[Repository, str, dict[str, bytes]] | None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif repository.gated:
            self.answer({"error": "gated"}, 403, X_Error_Code="GatedRepo")
        elif (found := repository.at(revision)) is None:
            self.answer({"error": "Invalid rev id"}, 404, X_Error_Code="RevisionNotFound")
        else:
            return repository, *found
        return None

    def _model(self, name: str, what: str, revision: str, body: bytes) -> None:
        found = self._found(name, revision)
        if found is None:
            return
        repository, sha, files = found
        if what == "revision":
            siblings = [{"rfilename": file} for file in files]
            self.answer({"id": name, "sha": sha, "private": repository.private, "siblings": siblings})
        elif what == "tree":
            self.answer([
                {"type": "file", "path": file, "size": len(x), "oid": blob(x)} for file, x in files.items()
            ])  # fmt: skip
        elif what == "preupload":
            self.answer({"files": [self._mode(each["path"], files) for each in json.loads(body)["files"]]})
        else:
            assert what == "commit", what
            self._commit(name, repository, [json.loads(line) for line in body.splitlines()])

    def _mode(self, file: str, files: dict[str, bytes]) -> dict[str, Any]:
        apart = self.hub.apart and file.endswith(".safetensors")
        known = (
            {"oid": hashlib.sha256(files[file]).hexdigest() if apart else blob(files[file])} if file in files else {}
        )
        return {"path": file, "uploadMode": "lfs" if apart else "regular", "shouldIgnore": False} | known

    def _batch(self, asked: dict[str, Any]) -> None:
        def action(each: dict[str, Any]) -> dict[str, Any]:
            upload = {"upload": {"href": f"http://{self.headers['Host']}/put/{each['oid']}", "header": {}}}
            return each | ({} if each["oid"] in self.hub.large else {"actions": upload})

        self.answer({"transfer": "basic", "objects": [action(each) for each in asked["objects"]]})

    def _commit(self, name: str, repository: Repository, lines: list[dict[str, Any]]) -> None:
        files, sent = dict(repository.files), []
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                sent.append(value["path"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
                sent.append(value["path"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        repository.uploaded.append(sent)
        sha = repository.commit(files)
        url = f"http://{self.headers['Host']}/{name}/commit/{sha}"
        self.answer({"commitUrl": url, "commitOid": sha, "success": True})

    def _file(self, name: str, revision: str, file: str) -> None:
        found = self._found(name, revision)
        if found is not None and file not in found[2]:
            self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        elif found is not None:
            content = found[2][file]
            self.answer(body=content, ETag=f'"{blob(content)}"', X_Repo_Commit=found[1])


def set_offline(monkeypatch: pytest.MonkeyPatch, offline: bool) -> None:
    """Let huggingface_hub request nothing, or what it is asked for."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    getattr(utils, "reset_sessions", lambda: None)()  # those of huggingface_hub 0 were made offline, or not


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Any:
    """A `Hub` that huggingface_hub uses in this test, with a token that may write, and an empty cache."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OfHub", (Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    for module in (constants, file_download):  # huggingface_hub 0 has a second one
        form = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", form, raising=False)
    set_offline(monkeypatch, False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    utils.disable_progress_bars()
    yield hub
    set_offline(monkeypatch, True)
    server.shutdown()
    server.server_close()
    thread.join()
