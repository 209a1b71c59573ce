"""
A Hub on loopback that the real huggingface_hub client talks to: repositories in memory, commits, pull requests, large files.

It answers what the client asks when it creates, uploads, lists and downloads; anything else is a 404.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import constants


TOKEN = "hf_stub_token_that_is_secret"


@dataclass
class Repo:
    """Commits by hash (files by path), branches and pull requests by name."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, bytes]) -> str:
        digest = hashlib.sha1(json.dumps([len(self.commits), sorted(files)]).encode()).hexdigest()
        self.commits[digest] = files
        self.refs[ref] = digest
        return digest

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        digest = self.refs.get(revision, revision)
        return (digest, self.commits[digest]) if digest in self.commits else None


class StubHub:
    """
    The server and what it holds.

    large: whether weights go by git LFS. requests: `METHOD path` of all so far. breaks: part of such a line -> how often to
    hang up; refuses: part of a line -> status and message to answer; cuts: file -> how often to send half of it; arrive: called
    when a request has been entered, before anything else.
    """

    def __init__(self, large: bool = False):
        self.large = large
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.breaks: dict[str, int] = {}
        self.refuses: dict[str, tuple[int, str]] = {}
        self.cuts: dict[str, int] = {}
        self.arrive: Callable[[], object] = lambda: None
        hub = self

        class Handler(_Handler):
            stub = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        found = self.repos[repo_id].at(revision)
        assert found is not None
        return found[1]


def connect(monkeypatch: pytest.MonkeyPatch, stub: StubHub, cache: Path) -> None:
    """Point the client of this process at the stub."""
    monkeypatch.setattr(constants, "ENDPOINT", stub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", stub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", stub.large)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # it keeps its endpoint
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


class _Handler(BaseHTTPRequestHandler):
    stub: StubHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), parse_qs(parts.query)
        name = f"{self.command} {path}"
        self.stub.requests.append(name)
        self.stub.arrive()
        body = self._body()
        for part, count in list(self.stub.breaks.items()):
            if part in name and count > 0:
                self.stub.breaks[part] = count - 1
                self.close_connection = True
                self.connection.close()
                return
        for part, (status, message) in self.stub.refuses.items():
            if part in name:
                return self._answer(status, {"error": message}, {"X-Error-Message": message})
        if body is None:
            return None
        if path.startswith("/api/") and self.command == "POST" and not self._authorised():
            message = "Invalid credentials in Authorization header"
            return self._answer(401, {"error": message}, {"X-Error-Message": message})
        self._route(path.strip("/").split("/"), query, body)

    do_GET = do_HEAD = do_POST = do_PUT = _serve  # noqa: N815

    def _authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _body(self) -> bytes | None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        # A client that died while it was sending has asked for nothing.
        return body if len(body) == length else None

    def _answer(self, status: int, content: Any = None, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _missing(self, code: str) -> None:
        self._answer(404, {"error": code}, {"X-Error-Code": code})

    # ---- what is asked for --------------------------------------------------------------------------------------

    def _route(self, path: list[str], query: dict, body: bytes) -> None:
        if path[:3] == ["api", "repos", "create"]:
            return self._create(json.loads(body))
        if path[:2] == ["api", "whoami-v2"]:
            return self._answer(200, {"name": "me", "type": "user", "orgs": []})
        if path[:2] == ["api", "validate-yaml"]:
            return self._answer(200, {"errors": [], "warnings": []})
        if path[0] == "objects" and self.command == "PUT":
            self.stub.objects[path[1]] = body
            return self._answer(200, {}, {"ETag": path[1]})
        if "info" in path and path[-1] == "batch":
            return self._batch(json.loads(body))
        repo_id = "/".join(path[2:4] if path[:2] == ["api", "models"] else path[:2])
        repo = self.stub.repos.get(repo_id)
        if repo is None or (repo.private and not self._authorised()):
            return self._missing("RepoNotFound")
        rest = path[4:] if path[:2] == ["api", "models"] else path[2:]
        return self._in_repo(repo_id, repo, rest, query, body)

    def _create(self, wanted: dict) -> None:
        repo_id = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if repo_id in self.stub.repos:
            return self._answer(409, {"error": "exists", "url": f"{self.stub.url}/{repo_id}"})
        repo = Repo(wanted.get("private") is True or wanted.get("visibility") == "private")
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.stub.repos[repo_id] = repo
        return self._answer(200, {"url": f"{self.stub.url}/{repo_id}", "name": repo_id})

    def _batch(self, wanted: dict) -> None:
        objects = []
        for entry in wanted["objects"]:
            answer = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in self.stub.objects:
                answer["actions"] = {"upload": {"href": f"{self.stub.url}/objects/{entry['oid']}"}}
            objects.append(answer)
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _in_repo(self, repo_id: str, repo: Repo, rest: list[str], query: dict, body: bytes) -> None:
        action = rest[0] if rest else "info"
        if action == "branch":
            repo.refs.setdefault("/".join(rest[1:]), repo.refs["main"])
            return self._answer(200, {})
        if action in ("info", "revision"):
            return self._info(repo_id, repo, "/".join(rest[1:]) or "main")
        if action == "preupload":
            return self._preupload(repo, "/".join(rest[1:]), json.loads(body))
        if action == "commit":
            return self._commit(repo_id, repo, "/".join(rest[1:]), bool(query.get("create_pr")), body)
        if action == "tree":
            return self._tree(repo, rest[1:])
        if action == "resolve":
            return self._resolve(repo, rest[1:])
        return self._missing("EntryNotFound")

    def _info(self, repo_id: str, repo: Repo, revision: str) -> None:
        found = repo.at(revision)
        if found is None:
            return self._missing("RevisionNotFound")
        siblings = [{"rfilename": name} for name in found[1]]
        card = found[1].get("README.md", b"").decode()
        # The Hub reads these two out of the card.
        tags = {key: _front(card, key) for key in ("pipeline_tag", "library_name")}
        self._answer(200, {"id": repo_id, "modelId": repo_id, "sha": found[0], "private": repo.private, "tags": [],
                           "siblings": siblings, "downloads": 0, "likes": 0, **tags})  # fmt: skip

    def _preupload(self, repo: Repo, revision: str, wanted: dict) -> None:
        found = repo.at(revision)
        if found is None:
            return self._missing("RevisionNotFound")
        answers = []
        for entry in wanted["files"]:
            large = self.stub.large and entry["path"].endswith(".safetensors")
            content = found[1].get(entry["path"])
            oid = None
            if content is not None:
                blob = b"blob %d\0" % len(content) + content
                oid = hashlib.sha256(content).hexdigest() if large else hashlib.sha1(blob).hexdigest()
            mode = "lfs" if large else "regular"
            answers.append({"path": entry["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._answer(200, {"files": answers})

    def _commit(self, repo_id: str, repo: Repo, revision: str, pull_request: bool, body: bytes) -> None:
        found = repo.at(revision)
        if found is None:
            return self._missing("RevisionNotFound")
        files = dict(found[1])
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.stub.objects[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
        digest = repo.commit(f"refs/pr/{number}" if pull_request else revision, files)
        answer = {"success": True, "commitOid": digest, "commitUrl": f"{self.stub.url}/{repo_id}/commit/{digest}"}
        if pull_request:
            answer["pullRequestUrl"] = f"{self.stub.url}/{repo_id}/discussions/{number}"
        self._answer(200, answer)

    def _tree(self, repo: Repo, rest: list[str]) -> None:
        # A revision may hold slashes, and so may the folder behind it.
        for length in range(len(rest), 0, -1):
            found = repo.at("/".join(rest[:length]))
            if found is not None:
                break
        else:
            return self._missing("RevisionNotFound")
        folder = "".join(f"{part}/" for part in rest[length:])
        names = [name for name in found[1] if name.startswith(folder)]
        if not names:
            return self._missing("EntryNotFound")
        return self._answer(
            200, [{"type": "file", "path": n, "size": len(found[1][n]), "oid": "0" * 40} for n in names]
        )

    def _resolve(self, repo: Repo, rest: list[str]) -> None:
        found = repo.at(rest[0])
        if found is None:
            return self._missing("RevisionNotFound")
        name = "/".join(rest[1:])
        if name not in found[1]:
            return self._answer(404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": found[0]})
        content = found[1][name]
        etag = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": found[0]}
        if self.stub.cuts.get(name, 0) and self.command == "GET":
            self.stub.cuts[name] -= 1
            # Says how long the file is, and hangs up in the middle.
            self.send_response(200)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return None
        return self._answer(200, content, headers)


def _front(card: str, key: str) -> str | None:
    lines = [line for line in card.split("\n---")[0].splitlines() if line.startswith(f"{key}: ")]
    return lines[0].split(": ", 1)[1] if lines else None
