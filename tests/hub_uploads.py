"""The writing half of the Hub's API: repositories are made, and files come in as commits with LFS beside them."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from hub_server import LFS_SUFFIXES, HubServer, _Commit, _Handler, _Refused

if TYPE_CHECKING:
    from pathlib import Path


class UploadHub(HubServer):
    """A Hub that takes uploads by its one user, "tester"; what has come in lies in `uploads`."""

    def __init__(self, uploads: Path, *, token: str, repos: dict[str, Path] | None = None, **options: Any) -> None:
        super().__init__(repos=repos or {}, token=token, **options)
        self.uploads = uploads
        self.blobs: dict[str, bytes] = {}
        self.read_only = False

    @property
    def handler(self) -> type[_Handler]:
        return _UploadHandler

    def is_private(self, repo_id: str) -> bool:
        return repo_id in self._private


class _UploadHandler(_Handler):
    def do_PUT(self) -> None:  # noqa: N802 - http.server's name for it
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = bytearray()
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            stream, self.rfile = self.rfile, io.BytesIO(bytes(body))
            self.headers["Content-Length"] = str(len(body))
            self._answer()
            self.rfile = stream
            return
        self._answer()

    def _route(self, path: str, query: dict[str, list[str]], body: bytes) -> None:
        hub: Any = self.server.hub
        if self.command == "PUT" and self.server.host == "cdn":
            oid = path.removeprefix("/lfs/")
            if hashlib.sha256(body).hexdigest() != oid:
                raise _Refused(400, None, "The content is not what was announced")
            hub.blobs[oid] = body
            self._json({})
            return
        writes = self.command == "POST" and not path.endswith("/paths-info/main")
        if not writes or self.server.host == "cdn":
            super()._route(path, query, body)
            return
        if path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
            return
        if not self._logged_in():
            raise _Refused(401, None, "Invalid username or password.")
        if hub.read_only:
            raise _Refused(403, None, "You don't have the rights to write here")
        if path == "/api/repos/create":
            self._create(json.loads(body))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            self._preupload(match[1], json.loads(body))
        elif match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self._batch(json.loads(body))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            self._take(match[1], body)
        else:
            super()._route(path, query, body)

    def _create(self, wanted: dict[str, Any]) -> None:
        hub: Any = self.server.hub
        repo_id = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
        url = f"{hub.endpoint}/{repo_id}"
        if repo_id in hub._repos:
            self._json({"error": "You already created this model repo", "url": url}, 409)
            return
        folder = hub.uploads / repo_id
        folder.mkdir(parents=True)
        hub._repos[repo_id] = {"main": _Commit(folder)}
        if wanted.get("private") or wanted.get("visibility") == "private":
            hub._private |= {repo_id}
        self._json({"url": url, "name": repo_id, "id": repo_id})

    def _preupload(self, repo_id: str, wanted: dict[str, Any]) -> None:
        self._check_access(repo_id, files=False)
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if "." + file["path"].rpartition(".")[2] in LFS_SUFFIXES else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in wanted["files"]
        ]
        self._json({"files": modes})

    def _batch(self, wanted: dict[str, Any]) -> None:
        cdn = self.server.hub._servers[1].url
        objects = [
            {**entry, "actions": {"upload": {"href": f"{cdn}/lfs/{entry['oid']}", "header": {}}}}
            for entry in wanted["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _take(self, repo_id: str, body: bytes) -> None:
        hub: Any = self.server.hub
        folder = hub.uploads / repo_id
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                content = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                content = hub.blobs[value["oid"]]
            else:
                continue
            target = folder / unquote(value["path"])
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        commit = _Commit(folder)
        hub._repos[repo_id]["main"] = commit
        url = f"{hub.endpoint}/{repo_id}/commit/{commit.sha}"
        assert urlsplit(url).netloc
        self._json({"success": True, "commitOid": commit.sha, "commitUrl": url, "hookOutput": ""})
