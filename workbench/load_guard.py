"""What is looked at before a load, and what is said when memory ran out all the same."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.hardware import Machine, format_bytes
from workbench.placement import place
from workbench.sizes import smaller_precisions
from workbench.verdict import Advice

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workbench.placement import Placement
    from workbench.skeleton import Skeleton

_ANYWAY = "wb.load(recipe, anyway=True) tries it: it may be slow, or the system may end this process."


class DoesNotFit(ValueError):  # noqa: N818 - a verdict, that reads as one where it is caught
    """There is too little memory or disk for a load or an answer.

    Attributes:
        advice: What would make it fit, the smallest change first.
        can_try: Whether it can be tried all the same, with ``anyway=True``.
    """

    def __init__(self, sentence: str, *, advice: Sequence[Advice] = (), can_try: bool = False) -> None:
        super().__init__(sentence)
        self.advice = tuple(advice)
        self.can_try = can_try


def unloadable_because(placement: Placement, skeleton: Skeleton) -> str | None:
    """Why no library here loads what is planned, however much memory there is, as a sentence; None if one does.

    Args:
        placement: What is to be loaded on this machine.
        skeleton: Its model.
    """
    title, precision = skeleton.source.title, placement.recipe.precision
    if skeleton.source.gguf_file is not None and "disk" in placement.device_map.values():
        return (
            f"{title} is a GGUF file, of which transformers puts nothing on disk: raise the other budgets, or save the "
            "loaded model once with save_pretrained and name that folder."
        )
    if skeleton.not_loadable_because is not None:
        return (
            f"{title} is quantized ({skeleton.quantized_as}), and this machine cannot load it: "
            f"{skeleton.not_loadable_because}."
        )
    refused = precision.refused_because(placement.device_map.values())
    return None if refused is None else f"{precision.label} cannot be loaded as the preview has it: {refused}."


def check_room(placement: Placement, here: Machine, skeleton: Skeleton, folder: str, *, anyway: bool) -> None:
    """Compare a placement with what is free at this moment: the preview may be minutes old.

    Args:
        placement: What is to be loaded.
        here: This machine, looked at just now.
        skeleton: Its model.
        folder: Where weights go that wait on disk and cannot be read from the checkpoint's own files.
        anyway: Pass over everything that can be tried.

    Raises:
        DoesNotFit: If it does not fit; the sentence says what would.
    """
    advice = tuple(placement.advice or ())
    if placement.verdict == "does_not_fit" and (placement.unplaced or not anyway):
        can_try = not placement.unplaced
        said = " ".join((placement.summary, *advice, *([_ANYWAY] if can_try else [])))
        raise DoesNotFit(said, advice=advice, can_try=can_try)
    if anyway:
        return
    for device, memory in placement.memory.items():
        free = here.device(device).free_bytes
        if device != "disk" and memory.used_bytes > free:
            raise DoesNotFit(
                f"{here.device(device).label} has {format_bytes(free)} free now, but {format_bytes(memory.used_bytes)} "
                f"are needed: close other programs or models, or lower the budgets. {_ANYWAY}",
                advice=advice,
                can_try=True,
            )
    waits = placement.memory["disk"].weight_bytes if "disk" in placement.memory else 0
    pickles = not all(file.name.endswith(".safetensors") for file in skeleton.source.weight_files)
    if waits and pickles:  # what safetensors hold can be read where it is
        above = next(p for p in (Path(folder).absolute(), *Path(folder).absolute().parents) if p.exists())
        free = shutil.disk_usage(above).free
        if waits > free:
            raise DoesNotFit(
                f"{above} has {format_bytes(free)} free, but {format_bytes(waits)} of weights are to wait there, "
                f"because the checkpoint's own files are pickles: make room, or name an offload_folder on another "
                f"disk. {_ANYWAY}",
                can_try=True,
            )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or the CPU."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return "allocate memory" in text or "out of memory" in text


def after_running_out(placement: Placement, skeleton: Skeleton, what: str) -> DoesNotFit:
    """The error for memory that ran out, with the smallest changes that fit into what is free now.

    Args:
        placement: What was to be loaded or was loaded.
        skeleton: Its model.
        what: What was being done, as the beginning of a sentence.
    """
    here, recipe = Machine.detect(), placement.recipe
    tried = place(recipe, machine=here, skeleton=skeleton)
    advice = [a for a in tried.advice or () if a.changes] if tried.verdict == "does_not_fit" else []
    workload = recipe.workload
    if not advice:
        options = [
            Advice(f"Load it in {smaller.label}: {format_bytes(size)} of weights.", precision=smaller)
            for smaller, size in smaller_precisions(skeleton, recipe.precision)
        ]
        advice = [
            a for a in options if place(a.apply(recipe), machine=here, skeleton=skeleton).verdict != "does_not_fit"
        ]
    if not advice and workload.context_length > 1:
        half = replace(workload, context_length=workload.context_length // 2)
        advice = [Advice(f"Halve the context to {half.context_length:,} tokens.", workload=half)]
    said = " ".join(advice[:1]) or "Close other programs or models."
    though = "" if placement.verdict == "does_not_fit" else ", though the preview said that it fits"
    return DoesNotFit(f"{what} ran out of memory{though}. {said}", advice=advice)
