"""What layers are made of: kinds of modules, and the module tree with sizes before and after quantization."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import ipywidgets as w
from traitlets import List, Unicode

from workbench.hardware import device_label, format_bytes
from workbench.panels.look import classed, html, problem_line
from workbench.panels.picture import device_colour
from workbench.sizes import Sizes, device_of, sizes_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from workbench.hardware import DeviceId
    from workbench.panels.state import State
    from workbench.placement import Placement
    from workbench.skeleton import Skeleton

# The first that is found in a tensor's name, from the right, says what it is.
_KIND_WORDS = (
    ("experts", r"experts?\b|shared_expert|\bmoe\b|block_sparse|router"),
    ("norm", r"norm|(^|\.)ln_|layernorm"),
    ("attention", r"attn|attention|rotary|(^|\.)(q|k|v|o|qkv|out|query|key|value)_proj\b|query_key_value"),
    ("MLP", r"mlp|feed_forward|ffn|(^|\.)fc\d|dense_h|dense_4h|DenseReluDense|intermediate"),
    ("head", r"lm_head|output_layer|embed_out"),
    ("embedding", r"embed|wte|wpe|shared|position"),
)
_MOST_ROWS = 400
_GROUP = 16  # more numbered children than this are folded into groups of as many


def kind_of(tensor: str) -> str:
    """What a tensor is a part of, by its name: one of ``MODULE_KINDS``."""
    return next((kind for kind, words in _KIND_WORDS if re.search(words, tensor)), "other")


def kinds_by_block(sizes: Sizes) -> dict[str, dict[str, int]]:
    """Layer name to the bytes, in the chosen precision, of each kind of module in it."""
    found: dict[str, dict[str, int]] = {}
    for tensor in sizes.tensors:
        kinds = found.setdefault(sizes.block_of[tensor.name], {})
        kind = kind_of(tensor.name)
        kinds[kind] = kinds.get(kind, 0) + tensor.after_bytes
    return found


@dataclass
class Node:
    """A module, a tensor, or a group of numbered modules.

    Attributes:
        path: Its name; a group's ends in its range.
        label: The last part of it.
        before_bytes: In the model's own dtype.
        after_bytes: In the chosen precision.
        tensors: How many tensors there are in it.
        children: What it is made of; none for a tensor.
    """

    path: str
    label: str
    before_bytes: int = 0
    after_bytes: int = 0
    tensors: int = 0
    children: dict[str, Node] = field(default_factory=dict)


def module_tree(sizes: Sizes) -> Node:
    """The module tree, with sums at every node; long lists of numbered modules are folded into groups."""
    root = Node("", "")
    for tensor in sizes.tensors:
        node = root
        parts = tensor.name.split(".")
        for depth in range(len(parts) + 1):
            node.before_bytes += tensor.before_bytes
            node.after_bytes += tensor.after_bytes
            node.tensors += 1
            if depth < len(parts):
                label = parts[depth]
                node = node.children.setdefault(label, Node(".".join(parts[: depth + 1]), label))
    _fold(root)
    return root


def _fold(node: Node) -> None:
    for child in node.children.values():
        _fold(child)
    numbered = [child for child in node.children.values() if child.label.isdecimal()]
    if len(numbered) <= _GROUP:
        return
    groups: dict[str, Node] = {label: child for label, child in node.children.items() if not label.isdecimal()}
    for at in range(0, len(numbered), _GROUP):
        part = numbered[at : at + _GROUP]
        label = f"{part[0].label} to {part[-1].label}"
        groups[label] = Node(
            path=f"{node.path}.{label}",
            label=label,
            before_bytes=sum(child.before_bytes for child in part),
            after_bytes=sum(child.after_bytes for child in part),
            tensors=sum(child.tensors for child in part),
            children={child.label: child for child in part},
        )
    node.children = groups


def visible_rows(
    root: Node, opened: Iterable[str], search: str, homes: dict[str, DeviceId]
) -> tuple[list[dict[str, Any]], int]:
    """The rows that are to be seen, from top to bottom.

    Args:
        root: The tree.
        opened: Paths of the nodes whose children are seen.
        search: Only what has this in its name is seen, with what is above it; empty sees everything.
        homes: A device map.

    Returns:
        The rows, at most some hundreds, and how many more there would be.
    """
    wanted, open_paths = search.strip().lower(), set(opened)
    rows: list[dict[str, Any]] = []
    more = 0

    def inside(path: str) -> set[DeviceId]:
        """The devices on which parts of a module are kept."""
        above = device_of(path, homes)
        if above is not None:
            return {above}
        return {home for name, home in homes.items() if name.startswith(f"{path}.")}

    def kept_on(node: Node) -> list[DeviceId]:
        parts = node.children.values() if " to " in node.label else [node]
        found = set().union(*(inside(part.path) for part in parts))
        return sorted(found, key=lambda device: (isinstance(device, str), str(device)))

    def matches(node: Node) -> bool:
        return wanted in node.path.lower() or any(matches(child) for child in node.children.values())

    def walk(node: Node, level: int) -> None:
        nonlocal more
        for child in node.children.values():
            if wanted and not matches(child):
                continue
            below = bool(wanted) and wanted not in child.path.lower()  # then something in it is what is looked for
            is_open = bool(child.children) and (child.path in open_paths or below)
            if len(rows) >= _MOST_ROWS:
                more += 1
                continue
            rows.append(
                {
                    "path": child.path,
                    "label": child.label,
                    "level": level,
                    "open": is_open if child.children else None,
                    "before": format_bytes(child.before_bytes),
                    "after": format_bytes(child.after_bytes),
                    "exact": f"{child.before_bytes:,} bytes before, {child.after_bytes:,} bytes after",
                    "tensors": child.tensors,
                    "homes": [[device_label(d), device_colour(d)] for d in kept_on(child)],
                }
            )
            if is_open:
                walk(child, level + 1)

    walk(root, 1)
    return rows, more


class Tree(anywidget.AnyWidget):
    """Rows that open and close; only what is seen is sent.

    Attributes:
        rows: What is seen, from top to bottom.
        opened: Paths that are open.
        search: What is looked for.
        note: What stands below.
    """

    _esm = Path(__file__).with_name("tree.js")
    rows = List().tag(sync=True)
    opened = List(Unicode()).tag(sync=True)
    search = Unicode().tag(sync=True)
    note = Unicode().tag(sync=True)


class TreePanel:
    """The module tree of the model that is previewed.

    Attributes:
        box: What is shown.
        tree: The rows.
    """

    def __init__(self, state: State, in_view: Any) -> None:
        self._state, self._in_view = state, in_view
        self._root: tuple[Sizes, Node] | None = None
        self.tree = classed(Tree(), "wb-tree")
        about = html("wb-note", value="Every module and tensor, with its bytes as stored and as loaded.")
        self.box = w.VBox([problem_line(state, "layers"), about, self.tree])
        state.observe(self.refresh, ["placement", "skeleton"])
        self.tree.observe(state.guarded("layers", lambda _: self.refresh()), ["opened", "search"])

    def refresh(self, _: object = None) -> None:
        """Show the tree anew, if anyone is looking."""
        with self._state.lock:
            placement, skeleton = self._state.placement, self._state.skeleton
            if placement is None or skeleton is None or not self._in_view():
                return
            rows, more = self._rows(placement, skeleton)
            with self.tree.hold_sync():
                if rows != self.tree.rows:
                    self.tree.rows = rows
                self.tree.note = f"{more} more rows: search, or close some." if more else ""

    def _rows(self, placement: Placement, skeleton: Skeleton) -> tuple[list[dict[str, Any]], int]:
        sizes = sizes_of(skeleton.on(placement.machine), placement.recipe.precision)
        if self._root is None or self._root[0] is not sizes:
            self._root = sizes, module_tree(sizes)
        return visible_rows(self._root[1], self.tree.opened, self.tree.search, placement.device_map)
