"""The reading half of the Hugging Face Hub's API, served from local folders, for tests that need a Hub to talk to.

The real clients (huggingface_hub, transformers) run against it, in a process of their own, because huggingface_hub
reads its endpoint from the environment when it is imported:

    with HubServer(repos={"org/tiny": folder}) as hub:
        subprocess.run([sys.executable, "-c", "..."], env=hub.env(tmp_path / "cache"), check=True)
    assert hub.sent_bytes(".safetensors") == 0  # no weights were downloaded

As on the real Hub, weights are not on the Hub's own host: `resolve` answers for them with a redirect to a second
server (the "cdn"), and their size and hash stand in headers of that redirect.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from huggingface_hub.repocard import metadata_load

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from typing_extensions import Self

# What the Hub keeps outside git: by suffix, and anything large.
LFS_SUFFIXES = frozenset({".bin", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth", ".safetensors"})
LFS_FROM_BYTES = 10_000_000
LFS_POINTER_BYTES = 134

CHUNK_BYTES = 1 << 16
# Bookkeeping folders that git and huggingface_hub leave in a working copy; they are not part of a repository.
NOT_CONTENT = frozenset({".git", ".cache"})
# Fixed, so that equal folders give equal answers.
SOME_DAY = "2024-01-01T00:00:00.000Z"

API_ROUTE = re.compile(
    r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/(?P<verb>[a-z-]+)(?:/(?P<rev>[^/]+)(?:/(?P<path>.+))?)?)?"
)
RESOLVE_ROUTE = re.compile(r"/(?P<repo>[^/]+(?:/[^/]+)?)/resolve/(?P<rev>[^/]+)/(?P<path>.+)")


@dataclass
class Request:
    """One request as the server saw it; `status` and `sent_bytes` are filled in while it is answered.

    Attributes:
        host: "hub", or "cdn" for the host that weights are redirected to.
        method: "GET", "HEAD" or "POST".
        path: The decoded path, without the query.
        query: The raw query string.
        range: The Range header, or None.
        authorized: Whether an Authorization header was sent.
        status: The HTTP status of the answer; 0 until there is one.
        sent_bytes: Body bytes handed to the socket so far, headers not counted. Never less than what the client got.
    """

    host: str
    method: str
    path: str
    query: str
    range: str | None
    authorized: bool
    status: int = 0
    sent_bytes: int = 0


@dataclass(frozen=True)
class _File:
    path: str
    source: Path
    size_bytes: int
    oid: str
    sha256: str | None  # only for what the Hub keeps as LFS

    @classmethod
    def read(cls, folder: Path, source: Path) -> _File:
        size_bytes = source.stat().st_size
        blob = hashlib.sha1(b"blob %d\0" % size_bytes, usedforsecurity=False)
        content = hashlib.sha256()
        with source.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                blob.update(chunk)
                content.update(chunk)
        lfs = source.suffix in LFS_SUFFIXES or size_bytes >= LFS_FROM_BYTES
        path = source.relative_to(folder).as_posix()
        return cls(path, source, size_bytes, blob.hexdigest(), content.hexdigest() if lfs else None)

    @property
    def etag(self) -> str:
        return f'"{self.sha256 or self.oid}"'

    def tree_entry(self) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": self.path, "size": self.size_bytes, "oid": self.oid}
        if self.sha256:
            entry["lfs"] = {"oid": self.sha256, "size": self.size_bytes, "pointerSize": LFS_POINTER_BYTES}
        return entry

    def sibling(self, *, blobs: bool) -> dict[str, Any]:
        entry: dict[str, Any] = {"rfilename": self.path}
        if blobs:
            entry |= {"size": self.size_bytes, "blobId": self.oid}
            if self.sha256:
                entry["lfs"] = {"sha256": self.sha256, "size": self.size_bytes, "pointerSize": LFS_POINTER_BYTES}
        return entry


class _Commit:
    """One state of a repository: a folder, read once. Its hash depends on names and contents alone."""

    def __init__(self, folder: Path) -> None:
        sources = sorted(
            source
            for source in folder.rglob("*")
            if source.is_file() and not NOT_CONTENT.intersection(source.relative_to(folder).parts)
        )
        self.files = {file.path: file for file in (_File.read(folder, source) for source in sources)}
        listing = "".join(f"{file.oid} {path}\n" for path, file in self.files.items())
        self.sha = hashlib.sha1(listing.encode(), usedforsecurity=False).hexdigest()

    @cached_property
    def folders(self) -> dict[str, dict[str, Any]]:
        """The entry of every folder by its path, the root left out."""
        paths = {str(parent) for path in self.files for parent in PurePosixPath(path).parents} - {"."}
        return {
            path: {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha256(path.encode()).hexdigest()[:40]}
            for path in sorted(paths)
        }

    def tree(self, below: str, *, recursive: bool) -> list[dict[str, Any]]:
        entries = [*self.folders.values(), *(file.tree_entry() for file in self.files.values())]
        parents = {entry["path"]: [str(parent) for parent in PurePosixPath(entry["path"]).parents] for entry in entries}
        root = below or "."
        return [
            entry
            for entry in entries
            if (root in parents[entry["path"]] if recursive else parents[entry["path"]][0] == root)
        ]

    @cached_property
    def described(self) -> dict[str, Any]:
        """What the Hub works out from the files: the card's metadata, the config's main fields, parameter counts."""
        card: dict[str, Any] = {}
        if "README.md" in self.files:
            card = metadata_load(self.files["README.md"].source) or {}
        config = self._json("config.json")
        found: dict[str, Any] = {
            "cardData": card,
            "config": {
                key: config[key] for key in ("architectures", "model_type", "quantization_config") if key in config
            },
            "usedStorage": sum(file.size_bytes for file in self.files.values()),
        }
        parameters = dict(self._parameters())
        if parameters:
            found["safetensors"] = {"parameters": parameters, "total": sum(parameters.values())}
        causal = any(name.endswith("ForCausalLM") for name in config.get("architectures") or ())
        if pipeline := card.get("pipeline_tag") or ("text-generation" if causal else None):
            found["pipeline_tag"] = pipeline
        if library := card.get("library_name") or ("transformers" if config else None):
            found["library_name"] = library
        marks = [library, "safetensors" if parameters else None, config.get("model_type"), *(card.get("tags") or ())]
        found["tags"] = [mark for mark in marks if mark]
        if "license" in card:
            found["tags"].append(f"license:{card['license']}")
        return found

    def _json(self, path: str) -> dict[str, Any]:
        # A test may serve a broken config on purpose: the Hub then simply knows less about the repository.
        with suppress(KeyError, ValueError):
            content = json.loads(self.files[path].source.read_bytes())
            return content if isinstance(content, dict) else {}
        return {}

    def _parameters(self) -> Iterator[tuple[str, int]]:
        counts: dict[str, int] = {}
        for file in self.files.values():
            if not file.path.endswith(".safetensors"):
                continue
            with file.source.open("rb") as stream, suppress(ValueError, AttributeError, KeyError, TypeError):
                size_bytes = int.from_bytes(stream.read(8), "little")
                if size_bytes > file.size_bytes:
                    continue
                for name, tensor in json.loads(stream.read(size_bytes)).items():
                    if name != "__metadata__":
                        counts[tensor["dtype"]] = counts.get(tensor["dtype"], 0) + math.prod(tensor["shape"])
        yield from counts.items()


class HubServer:
    """A Hub on this machine, with ordinary folders as its repositories.

    A context manager: it listens while the block runs. Folders are read (and hashed) when the server is made.

    Args:
        repos: Repository id, "org/name", to the folder that is its branch "main".
        revisions: More branches and tags: repository id to name to folder. Every revision can also be asked for by its
            commit hash, `hub.sha("org/name")`.
        private: Repositories that look as if they did not exist without the token.
        gated: Repositories whose page is public and whose files need the token (and, see `granted`, permission).
        granted: The gated repositories that the token's owner has been let into; None means all of them.
        token: The one valid token. Any other is refused everywhere, as on the Hub.
        bytes_per_s: How fast file contents are sent on each connection; None means as fast as possible. The attribute
            can be changed while a download runs.

    Attributes:
        requests: Every request so far, in the order of arrival.

    Raises:
        ValueError: If a repository id is not of the form "org/name", a folder does not exist, an option names a
            repository that is not served, or bytes_per_s is below 1.
    """

    def __init__(
        self,
        *,
        repos: Mapping[str, Path],
        revisions: Mapping[str, Mapping[str, Path]] | None = None,
        private: Collection[str] = (),
        gated: Collection[str] = (),
        granted: Collection[str] | None = None,
        token: str | None = None,
        bytes_per_s: int | None = None,
    ) -> None:
        revisions = revisions or {}
        for repo_id in repos:
            if not re.fullmatch(r"[^/]+/[^/]+", repo_id):
                raise ValueError(f"{repo_id!r} is no repository id: write it as 'org/name'.")
        for repo_id in {*revisions, *private, *gated, *(granted or ())}:
            if repo_id not in repos:
                raise ValueError(f"{repo_id!r} is not served: add it to repos.")
        if bytes_per_s is not None and bytes_per_s < 1:
            raise ValueError("bytes_per_s must be at least 1, or None for full speed.")
        self.requests: list[Request] = []
        self.token = token
        self.bytes_per_s = bytes_per_s
        self._private = frozenset(private)
        self._gated = frozenset(gated)
        self._granted = self._gated if granted is None else frozenset(granted)
        commits: dict[Path, _Commit] = {}
        self._repos: dict[str, dict[str, _Commit]] = {}
        for repo_id, folder in repos.items():
            named = {"main": folder, **revisions.get(repo_id, {})}
            for place in named.values():
                if not place.is_dir():
                    raise ValueError(f"{place} is not a folder: make it before serving it as {repo_id!r}.")
                if place not in commits:
                    commits[place] = _Commit(place)
            self._repos[repo_id] = {name: commits[place] for name, place in named.items()}
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._servers: list[_Server] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        """Start listening on two free ports of the loopback interface: the hub's, and the cdn's."""
        self._servers = [_Server(self, "hub"), _Server(self, "cdn")]
        for server in self._servers:
            # The poll is only how soon shutdown() is noticed.
            thread = threading.Thread(
                target=server.serve_forever, kwargs={"poll_interval": 0.02}, name=f"{server.host}-server"
            )
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop listening, cut the downloads that still run, and wait until every thread has ended."""
        self._closing.set()
        for server in self._servers:
            server.shutdown()
            server.cut_connections()
            server.server_close()
        for thread in self._threads:
            thread.join()

    @property
    def handler(self) -> type[_Handler]:
        """What answers; hub_uploads.py has one that takes uploads as well."""
        return _Handler

    @property
    def endpoint(self) -> str:
        """The address that HF_ENDPOINT or `HfApi(endpoint=...)` is given."""
        return self._servers[0].url

    def sha(self, repo_id: str, revision: str = "main") -> str:
        """Return the commit hash of a revision.

        Raises:
            KeyError: If there is no such repository or revision.
        """
        return self._repos[repo_id][revision].sha

    def env(self, cache: Path, *, token: str | None = None) -> dict[str, str]:
        """Return the whole environment of a client process: this one's, pointed at this server, with an empty home.

        Args:
            cache: What HF_HOME becomes; need not exist.
            token: The token that the client is logged in with.
        """
        inherited = {
            name: value for name, value in os.environ.items() if not re.match(r"HF_|HUGGING|TRANSFORMERS_", name)
        }
        return inherited | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            # Else the library asks a package index, once a day, whether it is the newest.
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            **({"HF_TOKEN": token} if token else {}),
        }

    def sent_bytes(self, suffix: str = "") -> int:
        """Return how many body bytes were sent for paths that end in `suffix`, from both hosts, errors included."""
        return sum(request.sent_bytes for request in list(self.requests) if request.path.endswith(suffix))

    def wait_until(self, holds: Callable[[], bool], *, timeout_s: float = 60) -> None:
        """Wait for a condition on what was asked and sent, checked at every request and every chunk.

        Raises:
            TimeoutError: If it does not come to hold in time; the message lists the requests.
        """
        with self._changed:
            if not self._changed.wait_for(holds, timeout_s):
                raise TimeoutError(f"still not so after {timeout_s} s; the requests were {self.requests}")


class _Server(ThreadingHTTPServer):
    # Non-daemon threads are joined by server_close(): a test that ends leaves nothing running behind it.
    daemon_threads = False

    def __init__(self, hub: HubServer, host: str) -> None:
        self.hub = hub
        self.host = host
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), hub.handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._connections.discard(request)
        super().shutdown_request(request)

    def cut_connections(self) -> None:
        """End the connections that clients keep open, or whose download is still running."""
        with self._lock:
            for connection in self._connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


class _Refused(Exception):  # noqa: N818  # an answer, not a failure
    def __init__(
        self, status: int, code: str | None, message: str, *, commit: str | None = None, **headers: str
    ) -> None:
        self.status = status
        self.headers = {"X-Error-Message": message, **headers}
        if code:
            self.headers["X-Error-Code"] = code
        if commit:
            self.headers["X-Repo-Commit"] = commit
        super().__init__(message)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and body go out in two writes; Nagle would hold the second one back for 40 ms.
    disable_nagle_algorithm = True
    server: _Server

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        """Stay silent: `HubServer.requests` is the log."""

    def _answer(self) -> None:
        hub = self.server.hub
        url = urlsplit(self.path)
        # Read even when unused: the next request on this connection starts behind it.
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.seen = Request(
            host=self.server.host,
            method=self.command,
            path=unquote(url.path),
            query=url.query,
            range=self.headers.get("Range"),
            authorized="Authorization" in self.headers,
        )
        with hub._changed:
            hub.requests.append(self.seen)
            hub._changed.notify_all()
        try:
            try:
                self._route(url.path, parse_qs(url.query), body)
            except _Refused as refusal:
                self._json({"error": str(refusal)}, refusal.status, refusal.headers)
        except ConnectionError:
            # The client went away, or the server is being closed.
            self.close_connection = True

    def _route(self, path: str, query: dict[str, list[str]], body: bytes) -> None:
        if self.server.host == "cdn":
            repo_id, commit, name = re.fullmatch(r"/([^/]+/[^/]+)/([^/]+)/(.+)", path).groups()  # type: ignore[union-attr]
            self._file(self._commit(repo_id, commit).files[unquote(name)])
        elif path == "/api/whoami-v2":
            self._whoami()
        elif match := API_ROUTE.fullmatch(path):
            self._api(match, query, body)
        elif match := RESOLVE_ROUTE.fullmatch(path):
            self._resolve(match["repo"], unquote(match["rev"]), unquote(match["path"]))
        elif path.startswith("/api/") and not path.startswith(("/api/models/", "/api/datasets/", "/api/spaces/")):
            raise _Refused(404, None, "This server does not speak this part of the API")
        else:
            # Other kinds of repositories, and ids without an organisation: none of them is here.
            self._refuse_missing()

    def _whoami(self) -> None:
        if not self._logged_in():
            raise _Refused(401, None, "Invalid username or password.")
        role = {"displayName": "tests", "role": "read", "createdAt": SOME_DAY}
        user = {"type": "user", "id": "0", "name": "tester", "fullname": "A Tester", "isPro": False, "orgs": []}
        self._json({**user, "auth": {"type": "access_token", "accessToken": role}})

    def _api(self, match: re.Match[str], query: dict[str, list[str]], body: bytes) -> None:
        repo_id, verb = match["repo"], match["verb"]
        self._check_access(repo_id, files=verb == "auth-check")
        commit = self._commit(repo_id, unquote(match["rev"] or "main"))
        below = unquote(match["path"] or "")
        if verb is None or verb == "revision":
            self._json(self._info(repo_id, commit, query))
        elif verb == "tree":
            if below and below not in commit.folders:
                raise _Refused(404, "EntryNotFound", "Entry not found", commit=commit.sha)
            self._json(commit.tree(below, recursive=query.get("recursive") == ["true"]))
        elif verb == "paths-info":
            wanted = parse_qs(body.decode())["paths"]
            entries = commit.folders | {path: file.tree_entry() for path, file in commit.files.items()}
            self._json([entries[path] for path in wanted if path in entries])
        elif verb == "refs":
            named = self.server.hub._repos[repo_id].items()
            branches = [_ref("heads", name, commit) for name, commit in named if name == "main"]
            tags = [_ref("tags", name, commit) for name, commit in named if name != "main"]
            self._json({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})
        elif verb == "auth-check":
            self._json({})
        else:
            raise _Refused(404, None, f"This server does not speak /api/models/.../{verb}")

    def _info(self, repo_id: str, commit: _Commit, query: dict[str, list[str]]) -> dict[str, Any]:
        hub = self.server.hub
        info = {
            "_id": commit.sha[:24],
            "id": repo_id,
            "modelId": repo_id,
            "author": repo_id.partition("/")[0],
            "sha": commit.sha,
            "createdAt": SOME_DAY,
            "lastModified": SOME_DAY,
            "private": repo_id in hub._private,
            "gated": "manual" if repo_id in hub._gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "siblings": [file.sibling(blobs=query.get("blobs") == ["true"]) for file in commit.files.values()],
            **commit.described,
        }
        if wanted := query.get("expand"):
            info = {key: value for key, value in info.items() if key in {"_id", "id", *wanted}}
        return info

    def _resolve(self, repo_id: str, revision: str, path: str) -> None:
        self._check_access(repo_id, files=True)
        commit = self._commit(repo_id, revision)
        if path not in commit.files:
            raise _Refused(404, "EntryNotFound", "Entry not found", commit=commit.sha)
        file = commit.files[path]
        if file.sha256 is None:
            self._file(file, {"X-Repo-Commit": commit.sha})
            return
        cdn = self.server.hub._servers[1].url
        location = f"{cdn}/{repo_id}/{commit.sha}/{quote(path)}"
        linked = {"X-Linked-Etag": file.etag, "X-Linked-Size": str(file.size_bytes), "Accept-Ranges": "bytes"}
        self._start(302, {"X-Repo-Commit": commit.sha, "Location": location, **linked}, 0)

    def _check_access(self, repo_id: str, *, files: bool) -> None:
        hub = self.server.hub
        logged_in = self._logged_in()
        if repo_id not in hub._repos or (repo_id in hub._private and not logged_in):
            self._refuse_missing()
        if files and repo_id in hub._gated:
            if not logged_in:
                raise _Refused(
                    401,
                    "GatedRepo",
                    f"Access to model {repo_id} is restricted. You must be authenticated to access it.",
                )
            if repo_id not in hub._granted:
                raise _Refused(
                    403, "GatedRepo", f"Access to model {repo_id} is restricted and you are not in the authorized list."
                )

    def _logged_in(self) -> bool:
        header = self.headers.get("Authorization")
        if header is None:
            return False
        if self.server.hub.token is None or header != f"Bearer {self.server.hub.token}":
            raise _Refused(401, None, "Invalid credentials in Authorization header")
        return True

    def _refuse_missing(self) -> None:
        # To somebody unknown the Hub does not tell a missing repository from a private one: 401 for both.
        raise _Refused(404 if self._logged_in() else 401, "RepoNotFound", "Repository not found")

    def _commit(self, repo_id: str, revision: str) -> _Commit:
        named = self.server.hub._repos[repo_id]
        by_sha = {commit.sha: commit for commit in named.values()}
        commit = named.get(revision) or by_sha.get(revision)
        if commit is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {quote(revision)}")
        return commit

    def _file(self, file: _File, headers: Mapping[str, str] | None = None) -> None:
        first, past = 0, file.size_bytes
        status = 200
        headers = {
            "ETag": file.etag,
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
            **(headers or {}),
        }
        # Anything but one plain range is answered whole, which HTTP allows.
        if asked := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or ""):
            start, end = asked.groups()
            if start:
                first, past = int(start), min(file.size_bytes, int(end) + 1 if end else file.size_bytes)
            elif end:
                first = max(0, file.size_bytes - int(end))
            if first >= past:
                raise _Refused(416, None, "Range not satisfiable", **{"Content-Range": f"bytes */{file.size_bytes}"})
            if start or end:
                status = 206
                headers["Content-Range"] = f"bytes {first}-{past - 1}/{file.size_bytes}"
        self._start(status, headers, past - first)
        if self.command == "HEAD":
            return
        hub = self.server.hub
        with file.source.open("rb") as stream:
            stream.seek(first)
            left_bytes = past - first
            while left_bytes and not hub._closing.is_set():
                speed = hub.bytes_per_s
                # Slow sending goes in small steps, so that a change of speed, or the end, is noticed within 50 ms.
                chunk = stream.read(
                    min(left_bytes, CHUNK_BYTES if speed is None else max(1, min(CHUNK_BYTES, speed // 20)))
                )
                self._send(chunk)
                left_bytes -= len(chunk)
                if speed is not None:
                    hub._closing.wait(len(chunk) / speed)

    def _json(self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self._start(status, {"Content-Type": "application/json; charset=utf-8", **(headers or {})}, len(body))
        if self.command != "HEAD":
            self._send(body)

    def _start(self, status: int, headers: Mapping[str, str], body_bytes: int) -> None:
        # Kept before it is sent: whoever has the answer finds it in the log.
        self.seen.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(body_bytes))
        self.end_headers()

    def _send(self, chunk: bytes) -> None:
        hub = self.server.hub
        with hub._changed:
            self.seen.sent_bytes += len(chunk)
            hub._changed.notify_all()
        self.wfile.write(chunk)


def _ref(kind: str, name: str, commit: _Commit) -> dict[str, str]:
    return {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commit.sha}
