"""accelerate's knobs, folded away: nobody who does not look for them meets them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ipywidgets as w

from workbench.panels.look import classed, html, text_field
from workbench.panels.state import bind

if TYPE_CHECKING:
    from workbench.panels.state import State


def advanced(state: State) -> w.Accordion:
    """The knobs of planning and offloading that most people leave alone."""
    no_split = text_field(
        "Never split",
        "wb-no-split",
        "the model's own list",
        "no_split_module_classes: classes of modules that stay on one device, with commas between them",
    )
    fallback = classed(
        w.Checkbox(
            description="Fallback allocation",
            indent=False,
            tooltip="fallback_allocation: where the next module does not fit, look for one that does",
        ),
        "wb-fallback",
    )
    buffers = classed(
        w.Checkbox(
            description="Offload buffers",
            indent=False,
            tooltip="offload_buffers: buffers of modules that wait on the CPU or disk wait there too",
        ),
        "wb-offload-buffers",
    )
    folder = text_field(
        "Offload folder",
        "wb-offload-folder",
        "a temporary one",
        "offload_folder: where weights wait on disk if the checkpoint's own files cannot serve",
    )
    for control, name, show, write in (
        (no_split, "no_split_module_classes", lambda names: ", ".join(names or ()), _names),
        (fallback, "fallback_allocation", bool, bool),
        (buffers, "offload_buffers", bool, bool),
        (folder, "offload_folder", lambda path: path or "", lambda text: text.strip() or None),
    ):
        bind(
            control,
            state,
            "devices",
            show=lambda name=name, show=show: show(getattr(state.recipe, name)),  # type: ignore[misc]
            write=lambda value, name=name, write=write: state.update(**{name: write(value)}),  # type: ignore[misc]
        )
    note = html("wb-note", value="With accelerate's names and defaults.")
    box = classed(
        w.Accordion([w.VBox([no_split, fallback, buffers, folder, note])], titles=("Advanced",)),
        "wb-advanced",
        "wb-knobs",
    )
    box.selected_index = None
    return box


def _names(text: str) -> tuple[str, ...] | None:
    return tuple(name.strip() for name in text.split(",") if name.strip()) or None
