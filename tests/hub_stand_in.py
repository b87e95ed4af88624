"""
A Hub on 127.0.0.1 for real clients in other processes: standard library only, everything in memory, faults on demand.

    with HubStandIn() as hub:
        hub.fail("POST .*/commit/", 503)
        subprocess.run([...], env=hub.environ(folder))
        hub.repository("you/model").files()
"""

import base64
import json
import os
import re
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_store import Commit, Refused, Repository, file_id, git_hash, is_large


# Tokens that the stand-in knows, with the names and roles of those who hold them.
WRITER, READER, STRANGER = "hf_stand_in_writer", "hf_stand_in_reader", "hf_stand_in_stranger"
USERS = {WRITER: ("you", "write"), READER: ("you", "read"), STRANGER: ("somebody", "write")}
HTML = b"<html><body><h1>Service Unavailable</h1></body></html>"


@dataclass
class Fault:
    """What goes wrong with requests whose `METHOD path` matches `call`, so many `times`."""

    call: str
    status: int = 503
    times: int = 10**6
    message: str = "This call was made to fail"
    code: str | None = None
    # The request is carried out before the answer is replaced.
    landed: bool = False
    # The connection is cut after so many bytes of the request's body.
    cut: int | None = None
    # What somebody else does just before the request, which then is carried out as if nothing had happened.
    meanwhile: Callable[[], object] | None = None
    # A web page from some proxy in between, instead of the Hub's own JSON.
    html: bool = False


class HubStandIn(ThreadingHTTPServer):
    """The server; a context manager that runs it in a thread."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.large: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        # "METHOD path" of every request, in order.
        self.requests: list[str] = []
        self.state = threading.RLock()

    def __enter__(self) -> "HubStandIn":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def environ(self, home: Path, token: str | None = WRITER) -> dict[str, str]:
        """The environment of a client: this Hub, an own cache and token, none of ours but what Python needs."""
        names = ("PATH", "LANG", "TMPDIR", "OMP_NUM_THREADS", "SYSTEMROOT")
        kept = {name: os.environ[name] for name in names if name in os.environ}
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HOME": str(home), "NO_PROXY": "127.0.0.1"}
        own |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "CUDA_VISIBLE_DEVICES": ""}
        return kept | own | ({} if token is None else {"HF_TOKEN": token})

    def fail(self, call: str, status: int = 503, **options: Any) -> Fault:
        """Adds a [`Fault`]."""
        self.faults.append(Fault(call, status, **options))
        return self.faults[-1]

    def reset(self) -> None:
        """An empty Hub without faults."""
        with self.state:
            for kept in (self.repositories, self.large, self.faults, self.requests):
                kept.clear()

    def repository(self, name: str, kind: str = "models") -> Repository:
        """A repository, as the test sees it."""
        return self.repositories[kind, name]

    def create(self, name: str, kind: str = "models", **fields: Any) -> Repository:
        """A repository that is there before any client comes."""
        self.repositories[kind, name] = Repository(name, **fields)
        return self.repositories[kind, name]

    def calls(self, pattern: str) -> list[str]:
        """The requests that match."""
        return [request for request in self.requests if re.search(pattern, request)]

    def fault_for(self, call: str) -> Fault | None:
        """The first fault that is due for a request."""
        with self.state:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.call, call):
                    fault.times -= 1
                    return fault
        return None


ROUTES: list[tuple[re.Pattern[str], str]] = []
REPO = r"(?P<kind>models|datasets|spaces)/(?P<id>[^/]+/[^/]+)"


def route(pattern: str) -> Callable[[Callable], Callable]:
    """Registers a method of the handler for requests whose `METHOD path` is all matched by `pattern`."""

    def register(function: Callable) -> Callable:
        ROUTES.append((re.compile(pattern), function.__name__))
        return function

    return register


class Handler(BaseHTTPRequestHandler):
    """One request: it is logged, perhaps made to fail, carried out and answered."""

    protocol_version = "HTTP/1.1"
    server: HubStandIn

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing on the screen: the log is `requests`."""

    def answer(self) -> None:
        """Whatever the method is."""
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        call = f"{self.command} {parts.path}"
        with self.server.state:
            self.server.requests.append(call)
        fault = self.server.fault_for(call)
        if fault is not None and fault.meanwhile is not None:
            fault.meanwhile()
            fault = None
        try:
            if fault is not None and fault.cut is not None:
                return self.cut(fault.cut)
            length = int(self.headers.get("Content-Length") or 0)
            self.body = self.rfile.read(length)
            if len(self.body) < length:
                raise ConnectionResetError("a client that was killed while it sent")
            self.respond(call, fault)
        except (BrokenPipeError, ConnectionResetError):
            # A client that has given up.
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815

    def respond(self, call: str, fault: Fault | None) -> None:
        """Carries out a request, unless a fault is due, and sends what comes of it."""
        try:
            if fault is None or fault.landed:
                with self.server.state:
                    status, headers, content = self.dispatch(call)
            if fault is not None:
                raise Refused(fault.status, fault.message, fault.code)
        except Refused as refused:
            status, content = refused.status, json.dumps(refused.body).encode()
            headers = {"X-Error-Message": refused.message, "Content-Type": "application/json"}
            headers |= {} if refused.code is None else {"X-Error-Code": refused.code}
            if fault is not None and fault.html:
                headers, content = {"Content-Type": "text/html"}, HTML
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def cut(self, length: int) -> None:
        """Reads so much of the request's body and resets the connection."""
        self.rfile.read(min(length, int(self.headers.get("Content-Length") or 0)))
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def dispatch(self, call: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and content of the answer."""
        for pattern, name in ROUTES:
            found = pattern.fullmatch(call)
            if found is not None:
                words = {key: unquote(value) for key, value in found.groupdict(default="").items()}
                done = getattr(self, name)(**words)
                return done if isinstance(done, tuple) else (200, {"Content-Type": "application/json"}, encode(done))
        raise Refused(404, "Not found")

    # Who asks, and for what

    def user(self) -> tuple[str, str] | None:
        """Name and role of whoever sent the request."""
        word = self.headers.get("Authorization")
        if word is None:
            return None
        if word.removeprefix("Bearer ") not in USERS:
            raise Refused(401, "Invalid credentials in Authorization header")
        return USERS[word.removeprefix("Bearer ")]

    def writer(self, namespace: str | None = None) -> str:
        """The name of a user whose token may write, in a `namespace` where one is given."""
        user = self.user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        if user[1] != "write" or namespace not in (None, user[0]):
            raise Refused(403, f"You don't have the rights to write under the namespace {namespace or user[0]!r}")
        return user[0]

    def committer(self, repository: Repository, revision: str) -> str:
        """The name of a user who may commit to a branch: anybody to a new pull request, or to one of their own."""
        user = self.user()
        own = [f"refs/pr/{pull['num']}" for pull in repository.pull_requests if user and pull["author"] == user[0]]
        is_open_to_all = "create_pr" in self.query or revision in own
        return self.writer(None if is_open_to_all else repository.id.split("/")[0])

    def repository(self, kind: str, id: str, content: bool = True) -> Repository:
        """A repository as far as the user may see it, and its content."""
        user = self.user()
        found = self.server.repositories.get((kind or "models", id))
        is_owner = user is not None and user[0] == id.split("/")[0]
        if found is None or found.private and not is_owner:
            raise Refused(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if content and found.gated and not is_owner:
            raise Refused(401 if user is None else 403, f"Access to model {id} is restricted.", "GatedRepo")
        return found

    # The calls

    @route("GET /api/whoami-v2")
    def whoami(self) -> Any:
        user = self.user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        name, role = user
        return {
            "type": "user",
            "name": name,
            "fullname": name,
            "orgs": [],
            "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": role}},
        }

    @route("POST /api/repos/create")
    def create_repository(self) -> Any:
        asked = json.loads(self.body)
        owner = self.writer(asked.get("organization"))
        kind, name = f"{asked.get('type', 'model')}s", f"{owner}/{asked['name']}"
        url = f"{self.server.url}/{'' if kind == 'models' else f'{kind}/'}{name}"
        if (kind, name) in self.server.repositories:
            raise Refused(409, "You already created this model repo", url=url)
        self.server.create(name, kind, private=asked.get("visibility") == "private")
        return {"url": url}

    @route("POST /api/validate-yaml")
    def validate_yaml(self) -> Any:
        return {"errors": [], "warnings": []}

    @route(f"POST /api/{REPO}/branch/(?P<name>[^/]+)")
    def branch(self, kind: str, id: str, name: str) -> Any:
        repository = self.repository(kind, id)
        self.writer(id.split("/")[0])
        repository.branch(name, (json.loads(self.body) or {}).get("startingPoint", "main"))
        return {}

    @route(f"POST /api/{REPO}/preupload/(?P<revision>[^/]+)")
    def preupload(self, kind: str, id: str, revision: str) -> Any:
        repository = self.repository(kind, id)
        self.committer(repository, revision)
        there = repository.at(revision).files
        answers = []
        for path in (asked["path"] for asked in json.loads(self.body)["files"]):
            known = {"oid": file_id(path, there[path])} if path in there else {}
            mode = "lfs" if is_large(path) else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
        return {"files": answers}

    @route(r"POST /(?:(?P<kind>datasets|spaces)/)?(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
    def large_files(self, kind: str, id: str) -> Any:
        self.repository(kind, id)
        self.writer()
        objects = []
        for asked in json.loads(self.body)["objects"]:
            links = {name: {"href": f"{self.server.url}/lfs/{name}/{asked['oid']}"} for name in ("upload", "verify")}
            objects.append(asked | ({} if asked["oid"] in self.server.large else {"actions": links}))
        return {"transfer": "basic", "objects": objects}

    @route("PUT /lfs/upload/(?P<oid>[0-9a-f]{64})")
    def upload(self, oid: str) -> Any:
        if self.headers.get("Authorization") is not None:
            raise Refused(400, "The storage of large files is not the Hub: it must not see the token.")
        if oid != file_id(".bin", self.body):
            raise Refused(400, "The content is not what its hash says.")
        self.server.large[oid] = self.body
        return {}

    @route("POST /lfs/verify/(?P<oid>[0-9a-f]{64})")
    def verify(self, oid: str) -> Any:
        self.writer()
        if json.loads(self.body)["size"] != len(self.server.large.get(oid, b"")):
            raise Refused(404, "Not uploaded")
        return {}

    @route(f"POST /api/{REPO}/commit/(?P<revision>[^/]+)")
    def commit(self, kind: str, id: str, revision: str) -> Any:
        repository, is_pull_request = self.repository(kind, id), "create_pr" in self.query
        author = self.committer(repository, revision)
        lines = [json.loads(line) for line in self.body.splitlines()]
        for line in lines:
            if line["key"] == "file":
                line["value"]["content"] = base64.b64decode(line["value"]["content"])
        made, number = repository.commit(revision, lines, self.server.large, author if is_pull_request else None)
        page = f"{self.server.url}/{'' if kind == 'models' else f'{kind}/'}{id}"
        links = {} if number is None else {"pullRequestUrl": f"{page}/discussions/{number}"}
        return {"success": True, "commitUrl": f"{page}/commit/{made.sha}", "commitOid": made.sha, **links}

    @route(f"GET /api/{REPO}(?:/revision/(?P<revision>[^/]+))?")
    def information(self, kind: str, id: str, revision: str) -> Any:
        repository = self.repository(kind, id, content=False)
        commit = repository.at(revision or "main")
        answer = {"id": id, "modelId": id, "sha": commit.sha, "private": repository.private, "tags": []}
        files = [{"rfilename": path} for path in sorted(commit.files)]
        return answer | {"gated": "manual" if repository.gated else False, "disabled": False, "siblings": files}

    @route(f"GET /api/{REPO}/refs")
    def references(self, kind: str, id: str) -> Any:
        refs = self.repository(kind, id).refs.items()
        branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in refs]
        return {"branches": branches, "converts": [], "tags": []}

    @route(f"GET /api/{REPO}/discussions")
    def discussions(self, kind: str, id: str) -> Any:
        asked = {name: self.query[name][0] for name in ("author", "status") if name in self.query}
        found = [
            pull
            | {"author": {"name": pull["author"]}, "repo": {"name": id, "type": kind[:-1]}}
            | {"isPullRequest": True, "createdAt": "2025-01-01T00:00:00.000Z"}
            for pull in self.repository(kind, id).pull_requests
            if asked.items() <= pull.items()
        ]
        return {"count": len(found), "start": 0, "discussions": found}

    @route(f"GET /api/{REPO}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.*))?")
    def tree(self, kind: str, id: str, revision: str, folder: str) -> Any:
        commit = self.repository(kind, id).at(revision)
        prefix = f"{folder}/" if folder else ""
        inside = {path: content for path, content in commit.files.items() if path.startswith(prefix)}
        if folder and not inside:
            raise Refused(404, f"{folder} does not exist", "EntryNotFound")
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries = {}
        for path, content in sorted(inside.items()):
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts) if recursive else min(2, len(parts))):
                name = prefix + "/".join(parts[:depth])
                entries[name] = {"type": "directory", "oid": git_hash(name.encode()), "size": 0, "path": name}
            if recursive or len(parts) == 1:
                entries[path] = {"type": "file", "oid": git_hash(content), "size": len(content), "path": path}
                if is_large(path):
                    entries[path]["lfs"] = {"oid": file_id(path, content), "size": len(content), "pointerSize": 134}
        return list(entries.values())

    @route(
        r"(?:HEAD|GET) /(?:(?P<kind>datasets|spaces)/)?(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"
    )
    def resolve(self, kind: str, id: str, revision: str, path: str) -> Any:
        commit = self.repository(kind, id).at(revision)
        if path not in commit.files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        return self.content(commit, path)

    def content(self, commit: Commit, path: str) -> tuple[int, dict[str, str], bytes]:
        """A file, or the part of it that was asked for."""
        content, etag = commit.files[path], f'"{file_id(path, commit.files[path])}"'
        headers = {"X-Repo-Commit": commit.sha, "ETag": etag, "Content-Type": "application/octet-stream"}
        if is_large(path):
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(len(content))}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return 200, headers, content
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return 206, headers, content[first : last + 1]


def encode(value: Any) -> bytes:
    """JSON."""
    return json.dumps(value).encode()
