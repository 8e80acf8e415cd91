"""How far a load is, in bytes and files with the time that is left, and where it can be stopped."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.hardware import format_bytes
from workbench.session import Cancelled, Progress
from workbench.skeleton import turn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from typing_extensions import Self

    from workbench.model import Source

_SURE_SECONDS = 0.5  # before, nothing is said of the time that is left


def check_cancelled(cancel: threading.Event) -> None:
    """Stop here if that was asked for.

    Raises:
        Cancelled: If it was.
    """
    if cancel.is_set():
        raise Cancelled("The load was cancelled.")


def files_of(source: Source) -> dict[str, str]:
    """Tensor name to the file that holds it, for a folder of several; else nothing."""
    index = Path(source.location) / "model.safetensors.index.json"
    if not source.is_local or len(source.weight_files) < 2:
        return {}
    try:
        found: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError):
        return {}
    return found


@contextlib.contextmanager
def reporting(
    progress: Callable[[Progress], None],
    cancel: threading.Event,
    *,
    stage: str,
    sizes: Mapping[str, int],
    files: Mapping[str, str],
) -> Iterator[None]:
    """Turn transformers' progress bar over the weights into our progress, and make each step a place to cancel.

    Args:
        progress: Is told.
        cancel: Stops it.
        stage: ``"read"`` or ``"quantize"``.
        sizes: Parameter to its bytes before.
        files: Parameter to the file it comes from, as far as that is known.
    """
    import transformers

    here = threading.current_thread()

    def hook(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.current_thread() is not here:  # somebody else's bar
            return factory(*args, **kwargs)
        items = args[0] if args else kwargs.get("iterable", ())
        return _Steps(items, progress, cancel, stage=stage, sizes=sizes, files=files)

    previous = transformers.logging.set_tqdm_hook(hook)
    try:
        yield
    finally:
        transformers.logging.set_tqdm_hook(previous)


class _Steps:
    """Stands in for a tqdm bar over the weights, which come with their names."""

    def __init__(
        self,
        items: Any,
        progress: Callable[[Progress], None],
        cancel: threading.Event,
        *,
        stage: str,
        sizes: Mapping[str, int],
        files: Mapping[str, str],
    ) -> None:
        self._items, self._progress, self._cancel = items, progress, cancel
        self._stage, self._sizes, self._files = stage, sizes, files

    def __iter__(self) -> Iterator[Any]:
        verb = {"read": "reading", "quantize": "quantizing"}[self._stage]
        started, done, total = time.perf_counter(), 0, sum(self._sizes.values())
        seen: dict[str, None] = {}
        for item in self._items:
            check_cancelled(self._cancel)
            turn.pause()
            name = item[0] if isinstance(item, tuple) and item and isinstance(item[0], str) else ""
            if name in self._files:
                seen[self._files[name]] = None
            text = f"{verb} {format_bytes(done)} of {format_bytes(total)}"
            if seen:
                text += f", file {len(seen)} of {len(set(self._files.values()))}"
            self._progress(Progress(stage=self._stage, done=done, total=total, text=text + _left(started, done, total)))
            yield item
            done = min(total, done + self._sizes.get(name, 0))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *_, **__: None  # update, set_description, close, ...


def _left(started: float, done: int, total: int | None) -> str:
    """How long it will take at the speed so far, as the end of a sentence."""
    elapsed = time.perf_counter() - started
    if not total or done <= 0 or elapsed < _SURE_SECONDS:
        return ""
    seconds = elapsed * (total - done) / done
    return f", {seconds:.0f} s left" if seconds < 90 else f", {seconds / 60:.0f} min left"


def download_bar(progress: Callable[[Progress], None], cancel: threading.Event) -> type:
    """A class for huggingface_hub's ``tqdm_class``: reports bytes in place of drawing, and can be stopped.

    A download that is stopped is resumed by the next one.
    """
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[type-arg]
        """Reports in place of drawing."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})
            self._began = time.perf_counter()
            self._first = self._done = int(kwargs.get("initial") or 0)
            self._all = kwargs.get("total")

        def update(self, n: float | None = 1) -> bool | None:
            check_cancelled(cancel)
            self._done += int(n or 0)
            total = int(self._all) if self._all else None
            text = f"downloading {format_bytes(self._done)}"
            if total:
                left = _left(self._began, self._done - self._first, total - self._first)
                text += f" of {format_bytes(total)}{left}"
            progress(Progress(stage="download", done=self._done, total=total, text=text))
            return None

    return Bar
