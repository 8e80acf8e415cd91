"""accelerate's knobs, folded away: nobody who does not look for them meets them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ipywidgets as w

from workbench.panels.look import classed, html
from workbench.panels.state import bind

if TYPE_CHECKING:
    from workbench.panels.state import State


def advanced(state: State) -> w.Accordion:
    """The knobs of planning and offloading that most people leave alone."""
    no_split = classed(
        w.Text(
            description="Never split",
            placeholder="the model's own list",
            continuous_update=False,
            tooltip="no_split_module_classes: classes of modules that stay on one device, with commas between them",
        ),
        "wb-no-split",
        "wb-wide",
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
    folder = classed(
        w.Text(
            description="Offload folder",
            placeholder="a temporary one",
            continuous_update=False,
            tooltip="offload_folder: where weights wait on disk if the checkpoint's own files cannot serve",
        ),
        "wb-offload-folder",
        "wb-wide",
    )

    def write_no_split(text: str) -> None:
        names = tuple(name.strip() for name in text.split(",") if name.strip())
        state.update(no_split_module_classes=names or None)

    bind(
        no_split,
        state,
        "devices",
        show=lambda: ", ".join(state.recipe.no_split_module_classes or ()),
        write=write_no_split,
    )
    bind(
        fallback,
        state,
        "devices",
        show=lambda: state.recipe.fallback_allocation,
        write=lambda on: state.update(fallback_allocation=on),
    )
    bind(
        buffers,
        state,
        "devices",
        show=lambda: state.recipe.offload_buffers,
        write=lambda on: state.update(offload_buffers=on),
    )
    bind(
        folder,
        state,
        "devices",
        show=lambda: state.recipe.offload_folder or "",
        write=lambda text: state.update(offload_folder=text.strip() or None),
    )
    note = html("wb-note", value="With accelerate's names and defaults.")
    box = classed(
        w.Accordion([w.VBox([no_split, fallback, buffers, folder, note])], titles=("Advanced",)),
        "wb-advanced",
        "wb-knobs",
    )
    box.selected_index = None
    return box
