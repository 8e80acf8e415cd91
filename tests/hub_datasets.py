"""The Hub's API for data sets: their paths begin otherwise than those of models, and that is all."""

from __future__ import annotations

import re
from typing import Any

from hub_server import HubServer, _Handler


class DatasetHub(HubServer):
    """A Hub whose repositories are data sets."""

    @property
    def handler(self) -> type[_Handler]:
        return _DatasetHandler


class _DatasetHandler(_Handler):
    def _route(self, path: str, query: dict[str, list[str]], body: bytes) -> None:
        super()._route(re.sub(r"^(/api)?/(datasets/)", _as_model, path), query, body)

    def _info(self, repo_id: str, commit: Any, query: dict[str, list[str]]) -> dict[str, Any]:
        info = super()._info(repo_id, commit, query)
        return {key: value for key, value in info.items() if key not in ("modelId", "config", "library_name")}


def _as_model(match: re.Match[str]) -> str:
    return "/api/models/" if match[1] else "/"
