"""Weights that were quantized while they were loaded, kept on disk so that the next load only maps them.

A folder for each model in each precision: a model of its own, which ``from_pretrained`` reads to the same bits. What
was not used for longest goes when there is no room.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.model import cache_folder
from workbench.precision import FourBit, Int8

if TYPE_CHECKING:
    from collections.abc import Iterator

    from workbench.placement import Placement
    from workbench.skeleton import Skeleton

MOST_BYTES = 20 * 2**30
_MOST_OF_FREE = 0.25  # of the disk's free space
_FORMAT = 1
_CARD = "workbench.json"


@dataclass(frozen=True, kw_only=True)
class KeptWeights:
    """Quantized weights that are kept.

    Attributes:
        title: The model's name.
        precision: What they are quantized with, in words.
        size_bytes: On disk.
        folder: Where.
    """

    title: str
    precision: str
    size_bytes: int
    folder: Path


def key_of(skeleton: Skeleton, placement: Placement) -> str | None:
    """What tells these quantized weights from all others: the model's files, the choices, and what quantizes.

    Returns:
        A short text; None for what is not kept: weights that bitsandbytes does not quantize or that wait on the CPU or
        disk, and models that bring code of their own.
    """
    precision, source = placement.recipe.precision, skeleton.source
    if (
        not isinstance(precision, (Int8, FourBit))
        or skeleton.quantized_as is not None
        or getattr(precision, "has_fp16_weight", False)
        or placement.waiting
        or source.trust_remote_code
    ):
        return None
    import bitsandbytes
    import transformers

    told = {
        "format": _FORMAT,
        "model": [source.location, source.revision, source.fingerprint],
        "written": [(Path(source.location) / file.name).stat().st_mtime_ns for file in source.weight_files]
        if source.is_local
        else None,
        "dtype": placement.dtype,
        "config": precision.to_config(placement.dtype).to_dict(),
        "libraries": [transformers.__version__, bitsandbytes.__version__],
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:32]


def find(key: str) -> Path | None:
    """The folder kept under a key, which counts as used now; None if there is none, or not all of it any more."""
    folder = _home() / key
    if not folder.exists():
        return None
    whole = False
    with contextlib.suppress(OSError):  # another process may be dropping it
        whole = any(kept.folder == folder and kept.size_bytes == _size_bytes(folder) for _, kept in _entries())
    if not whole:
        drop(folder)
        return None
    with contextlib.suppress(OSError):
        os.utime(folder)
    return folder


def keep(key: str, model: Any, *, title: str, precision: str, size_bytes: int) -> bool:
    """Write a model that has just been quantized, if there is room or room can be made.

    Args:
        key: From :func:`key_of`.
        model: As it was loaded.
        title: To show.
        precision: To show.
        size_bytes: What it takes.

    Returns:
        Whether it is kept.
    """
    from workbench.saving import new_folder, quiet_bars

    home = _home()
    if not _make_room(size_bytes):
        return False
    try:
        home.mkdir(parents=True, exist_ok=True)
        with new_folder(home / key, overwrite=True, needs_bytes=size_bytes) as made, quiet_bars():
            model.save_pretrained(made)
            card = KeptWeights(title=title, precision=precision, size_bytes=_size_bytes(made), folder=home / key)
            (made / _CARD).write_text(json.dumps(asdict(card), default=str), encoding="utf-8")
    except Exception:  # noqa: BLE001 - whatever the libraries make of a full disk, the load has been a success
        return False
    return True


def drop(folder: Path) -> None:
    """Remove what :func:`find` has found and what is of no use."""
    shutil.rmtree(folder, ignore_errors=True)


def kept_weights() -> tuple[KeptWeights, ...]:
    """What is kept, the last used first."""
    return tuple(kept for _, kept in sorted(_entries(), key=lambda entry: -entry[0]))


def empty() -> int:
    """Drop everything that is kept; models that were loaded from it keep what they have mapped.

    Returns:
        The bytes that were freed.
    """
    freed = sum(kept.size_bytes for _, kept in _entries())
    shutil.rmtree(_home(), ignore_errors=True)
    return freed


def _home() -> Path:
    return cache_folder() / "quantized"


def _entries() -> Iterator[tuple[float, KeptWeights]]:
    for card in _home().glob(f"*/{_CARD}"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            told = json.loads(card.read_text(encoding="utf-8"))
            yield card.parent.stat().st_mtime, KeptWeights(**{**told, "folder": card.parent})


def _make_room(size_bytes: int) -> bool:
    """Drop what was not used for longest until so much more is within the bounds."""
    entries = sorted(_entries(), key=lambda entry: entry[0])
    held = sum(kept.size_bytes for _, kept in entries)
    above = next(parent for parent in (_home(), *_home().parents) if parent.exists())
    bound = min(MOST_BYTES, int(_MOST_OF_FREE * (shutil.disk_usage(above).free + held)))
    if size_bytes > bound:
        return False
    for _, kept in entries:
        if held + size_bytes <= bound:
            break
        drop(kept.folder)
        held -= kept.size_bytes
    return True


def _size_bytes(folder: Path) -> int:
    """Of all that is kept there, our card apart."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file() and file.name != _CARD)
