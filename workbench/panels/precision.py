"""The Precision and Workload panels: the chosen method's options and nothing else, and what the model is used for."""

from __future__ import annotations

import dataclasses
from collections import Counter
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as w

from workbench.casts import conversions
from workbench.gptq_layers import with_fitting_groups
from workbench.panels.look import (
    classed,
    close_tree,
    html,
    panel,
    problem_line,
    text_field,
    threshold_slider,
    visible,
)
from workbench.panels.skip import ModulePicker
from workbench.panels.state import bind
from workbench.precision import (
    DTYPES,
    GPTQ,
    HQQ,
    QUANT_STORAGES,
    FourBit,
    FullPrecision,
    Int8,
    TorchAO,
    is_installed,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from workbench.panels.state import State
    from workbench.precision import Precision

_METHODS: dict[str, tuple[Precision, str]] = {
    "full": (FullPrecision(), "No quantization"),
    "int8": (Int8(), "LLM.int8(): linear weights in 8 bits, outliers in 16; half the room, hardly any loss"),
    "nf4": (FourBit(quant_type="nf4"), "4 bits, spaced for normally distributed weights; the usual choice for 4 bits"),
    "fp4": (FourBit(quant_type="fp4"), "4-bit floating point: coarser than nf4; for comparison"),
    "gptq": (GPTQ(), "2 to 8 bits, rounded with text as a guide: the Quantize tab makes it, once, into a folder"),
    "torchao": (TorchAO(), "torchao's weight-only int8 (any device) and int4 (NVIDIA GPUs from Ampere on)"),
    "hqq": (HQQ(), "Half-quadratic quantization: 1 to 8 bits without calibration text"),
}
# Methods that are offered only where their library is installed: most people have no use for them.
_EXTRA = ("torchao", "hqq")
_MOST_CHIPS = 24
_GROUPS = (("32", 32), ("64", 64), ("128", 128), ("256", 256))


def method_of(precision: Precision) -> str:
    """What the method's button says."""
    return precision.quant_type if isinstance(precision, FourBit) else precision.method


def name_groups(names: Iterable[str]) -> dict[str, int]:
    """What hundreds of module names end in, and how often: ``{"q_proj": 30, "lm_head": 1}``, in order of appearance.

    Such an ending is what ``skip_modules`` takes. A number says nothing by itself and keeps the part before it.
    """
    groups: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        groups[".".join(parts[-2:]) if parts[-1].isdecimal() else parts[-1]] += 1
    return dict(groups)


class PrecisionPanel:
    """The method and its options.

    Attributes:
        box: What is shown.
        chips: Module-name ending to its toggle button.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        # What was last chosen for each method, so that looking at another one loses nothing.
        self._last: dict[str, Precision] = {name: precision for name, (precision, _) in _METHODS.items()}
        offered = [name for name, (precision, _) in _METHODS.items() if name not in _EXTRA or is_installed(precision)]
        used = method_of(state.recipe.precision)
        offered += [used] if used not in offered else []
        self.chips: dict[str, Any] = {}
        self._offered: list[tuple[str, int]] = []
        self.method = classed(
            w.ToggleButtons(
                options=offered,
                # Those of the others too: a recipe from a cell may have such a method, and its button comes last.
                tooltips=[_METHODS[name][1] for name in dict.fromkeys((*offered, *_EXTRA))],
                value="full",
                description="Precision",
            ),
            "wb-precision",
            "wb-method",
            "wb-unseen-label",
        )
        self.dtype = classed(
            w.Dropdown(
                description="Type",
                options=("auto", *DTYPES),
                tooltip="The type of all weights; auto is what the model says of itself",
            ),
            "wb-dtype",
            "wb-wide",
        )
        self.threshold = threshold_slider(
            "wb-threshold",
            "Outliers: columns of the hidden states in which a magnitude reaches this are multiplied in 16 bits. Lower "
            "it if answers get worse, raise it for speed; 0 is off. The Outliers tab shows how many",
            Int8().threshold,
        )
        self.double_quant = classed(
            w.Checkbox(
                description="Double quantization",
                indent=False,
                tooltip="Quantize the scales too: 0.4 bits less a weight, hardly any loss; off only to compare",
            ),
            "wb-double-quant",
        )
        self.compute_dtype = classed(
            w.Dropdown(
                description="Compute type",
                options=("auto", *DTYPES),
                tooltip="The type to multiply in; auto is the model's own. Pick float16 on GPUs before Ampere, which "
                "have no bfloat16, or float32 for accuracy",
            ),
            "wb-compute-dtype",
            "wb-wide",
        )
        self.bits = classed(
            w.Dropdown(description="Bits", options=(2, 3, 4, 8), value=4, tooltip="Bits a weight; 4 is usual"),
            "wb-bits",
            "wb-wide",
        )
        self.group_size = classed(
            w.Dropdown(
                description="Group size",
                options=(("32", 32), ("64", 64), ("128", 128), ("whole rows", -1)),
                value=128,
                tooltip="So many weights of a row share a scale; smaller is better and takes more room",
            ),
            "wb-group-size",
            "wb-wide",
        )
        self.desc_act = classed(
            w.Checkbox(
                description="Act-order",
                indent=False,
                tooltip="desc_act: round the columns with the largest activations first; better, slower to run",
            ),
            "wb-desc-act",
        )
        self.sym = classed(
            w.Checkbox(
                description="Symmetric",
                value=True,
                indent=False,
                tooltip="sym: about zero; without it each group stores a zero point of its own",
            ),
            "wb-sym",
        )
        self._chips_box = classed(w.Box([]), "wb-skip")
        self.skip_text = text_field(
            "Skip by name",
            "wb-skip-text",
            "model.layers.0.mlp, ...",
            "Modules to leave unquantized, by name or part of a name, with commas between them",
        )
        self._skip_note = html("wb-note")
        self.offload = classed(
            w.Checkbox(
                description="fp32 CPU offload",
                indent=False,
                tooltip="Allow layers on the CPU or disk beside quantized ones on a GPU, where they stay unquantized: "
                "when the GPU is too small even so",
            ),
            "wb-fp32-offload",
        )
        self.has_fp16_weight = classed(
            w.Checkbox(
                description="Keep 16-bit weights",
                indent=False,
                tooltip="has_fp16_weight: quantize anew whenever they multiply. Only to train the weights themselves: "
                "it takes more room than no quantization",
            ),
            "wb-has-fp16-weight",
        )
        self.quant_storage = classed(
            w.Dropdown(
                description="Stored as",
                options=QUANT_STORAGES,
                tooltip="bnb_4bit_quant_storage: as which type the packed bytes are declared. The size stays; training "
                "with FSDP wants the model's own type",
            ),
            "wb-quant-storage",
            "wb-wide",
        )
        self.ao_bits = _dropdown("Bits", (8, 4), "wb-ao-bits", "8 runs on any device, 4 on NVIDIA GPUs from Ampere on")
        self.ao_group = _dropdown(
            "Group size",
            (("torchao's own", None), *_GROUPS, ("whole rows", -1)),
            "wb-ao-group",
            "So many weights of a row share a scale: whole rows in 8 bits, 128 in 4",
        )
        self.hqq_bits = _dropdown("Bits", (8, 4, 3, 2, 1), "wb-hqq-bits", "Bits a weight; 4 is usual")
        self.hqq_group = _dropdown("Group size", (("16", 16), *_GROUPS), "wb-hqq-group", "Weights that share a scale")
        self._modules = ModulePicker(state)
        self._casts = html("wb-note", "wb-casts")
        skip_label = html(value='<div title="Modules to leave unquantized">Skip modules (leave unquantized)</div>')
        self._skip = w.VBox([skip_label, self._chips_box, self.skip_text, self._modules.box, self._skip_note])
        self._stored_note = html("wb-note", "wb-stored")
        self.box = panel(
            "Precision",
            [
                self._stored_note,
                self.method,
                self.dtype,
                self.threshold,
                self.double_quant,
                self.compute_dtype,
                self.bits,
                self.group_size,
                self.desc_act,
                self.sym,
                self.ao_bits,
                self.ao_group,
                self.hqq_bits,
                self.hqq_group,
                self._skip,
                self.offload,
                self.has_fp16_weight,
                self.quant_storage,
                self._casts,
                problem_line(state, "precision"),
            ],
        )
        # First: the text for other names depends on which names have a button.
        state.observe(self._show_skips, ["recipe", "skeleton"])
        state.observe(self._show_method, ["recipe", "skeleton"])
        state.observe(self._show_casts, ["recipe", "skeleton", "placement"])
        self._tie()
        self._show_method()
        self._show_skips()

    def _tie(self) -> None:
        state = self._state
        bind(
            self.method,
            state,
            "precision",
            show=lambda: method_of(state.recipe.precision),
            write=self._pick_method,
        )
        for control, option in (
            (self.dtype, "dtype"),
            (self.threshold, "threshold"),
            (self.double_quant, "double_quant"),
            (self.compute_dtype, "compute_dtype"),
            (self.offload, "fp32_cpu_offload"),
            (self.has_fp16_weight, "has_fp16_weight"),
            (self.quant_storage, "quant_storage"),
            (self.desc_act, "desc_act"),
            (self.sym, "sym"),
        ):
            # A control of another method has nothing to say: it keeps what it shows.
            bind(
                control,
                state,
                "precision",
                show=lambda control=control, option=option: getattr(state.recipe.precision, option, control.value),  # type: ignore[misc]
                write=lambda value, option=option: self._set(**{option: value}),  # type: ignore[misc]
            )
        kinds = (
            (self.bits, self.group_size, GPTQ),
            (self.ao_bits, self.ao_group, TorchAO),
            (self.hqq_bits, self.hqq_group, HQQ),
        )
        for bits, group, kind in kinds:  # others have options of these names with other values
            for control, option in ((bits, "bits"), (group, "group_size")):
                bind(
                    control,
                    state,
                    "precision",
                    show=lambda control=control, option=option, kind=kind: (  # type: ignore[misc]
                        getattr(state.recipe.precision, option)
                        if isinstance(state.recipe.precision, kind)
                        else control.value
                    ),
                    write=lambda value, option=option: self._set(**{option: value}),  # type: ignore[misc]
                )
        bind(
            self.skip_text,
            state,
            "precision",
            show=lambda: ", ".join(name for name in self._skips() if name not in self.chips),
            write=self._set_skip_text,
        )

    def _pick_method(self, method: str) -> None:
        wanted, skeleton = self._last[method], self._state.skeleton
        if not isinstance(wanted, GPTQ) or skeleton is None:
            self._state.update(precision=wanted)
            return
        fitted = with_fitting_groups(wanted, skeleton)
        self._state.update(precision=fitted)
        if fitted.group_size != wanted.group_size:
            group = "whole rows" if fitted.group_size == -1 else f"groups of {fitted.group_size}"
            said = f"Groups of {wanted.group_size} do not divide this model's modules: {group} were taken."
            self._state.report("precision", said)

    def _skips(self) -> tuple[str, ...]:
        return getattr(self._state.recipe.precision, "skip_modules", ())

    def _usual(self) -> tuple[str, ...]:
        """What transformers leaves alone by itself; a first choice is added to it, and does not replace it."""
        skeleton = self._state.skeleton
        if skeleton is None or isinstance(self._state.recipe.precision, GPTQ):
            return ()  # GPTQ takes the decoder layers alone, whatever is named
        usual: tuple[str, ...] = skeleton.default_skips
        return usual

    def _set(self, **options: Any) -> None:
        self._state.update(precision=dataclasses.replace(self._state.recipe.precision, **options))

    def _set_skip_text(self, text: str) -> None:
        names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
        chosen = tuple(name for name in self._skips() or (self._usual() if names else ()) if name in self.chips)
        self._set(skip_modules=(*chosen, *(name for name in names if name not in chosen)))

    def _show_method(self, _: object = None) -> None:
        precision = self._state.recipe.precision
        skeleton = self._state.skeleton
        stored = None if skeleton is None else skeleton.quantized_as
        note = "" if stored is None else f"This checkpoint is quantized already: <b>{escape(stored)}</b>."
        if self._stored_note.value != note:
            self._stored_note.value = note
        visible(self._stored_note, when=stored is not None)
        visible(self.method, when=stored is None)
        self._last[method_of(precision)] = precision
        visible(self.dtype, when=isinstance(precision, FullPrecision) and stored is None)
        for control in (self.bits, self.group_size, self.desc_act, self.sym):
            visible(control, when=isinstance(precision, GPTQ) and stored is None)
        visible(self.threshold, when=isinstance(precision, Int8))
        visible(self.double_quant, when=isinstance(precision, FourBit))
        visible(self.compute_dtype, when=isinstance(precision, FourBit))
        visible(self._skip, when=not isinstance(precision, FullPrecision) and stored is None)
        visible(self.offload, when=isinstance(precision, (Int8, FourBit)))
        visible(self.has_fp16_weight, when=isinstance(precision, Int8))
        visible(self.quant_storage, when=isinstance(precision, FourBit))
        for control in (self.ao_bits, self.ao_group):
            visible(control, when=isinstance(precision, TorchAO))
        for control in (self.hqq_bits, self.hqq_group):
            visible(control, when=isinstance(precision, HQQ))

    def _show_casts(self, _: object = None) -> None:
        state = self._state
        text = ""
        if state.is_current and state.skeleton is not None:
            first, *rest = conversions(state.skeleton, state.recipe.precision) or ("",)
            if first:
                lines = "".join(f"<div>{escape(line)}</div>" for line in rest)
                text = f"<details><summary>{escape(first)}</summary>{lines}</details>"
        if self._casts.value != text and (text or state.skeleton is None):
            self._casts.value = text

    def _show_skips(self, _: object = None) -> None:
        skeleton = self._state.skeleton
        groups = name_groups(skeleton.linear_modules) if skeleton else {}
        wanted = dict(list(groups.items())[-_MOST_CHIPS:])
        if list(wanted.items()) != self._offered:
            self._offered = list(wanted.items())
            old = self._chips_box.children
            self.chips = {name: self._chip(name, times) for name, times in wanted.items()}
            self._chips_box.children = tuple(self.chips.values())
            close_tree(*old)
        for name, chip in self.chips.items():
            if chip.value != (name in self._skips()):
                chip.value = name in self._skips()
        default = ", ".join(self._usual())
        if self._skips():
            missing = [name for name in self._usual() if name not in self._skips()]
            note = f"{', '.join(missing)} is quantized too." if missing else ""
        else:
            note = "None chosen: the usual choice stays unquantized" + (f" ({default})." if default else ".")
        if self._skip_note.value != escape(note):
            self._skip_note.value = escape(note)

    def _chip(self, name: str, times: int) -> Any:
        chip = w.ToggleButton(
            description=name if times == 1 else f"{name} x{times}",
            tooltip=f"Leave {'this module' if times == 1 else f'these {times} modules'} unquantized: {name}",
        )

        def toggle(change: Any) -> None:
            with self._state.lock:
                skips = self._skips()
                if change["new"] == (name in skips):
                    return
                if change["new"]:
                    wanted = tuple(dict.fromkeys((*(skips or self._usual()), name)))
                else:
                    wanted = tuple(skip for skip in skips if skip != name)
                self._state.guarded("precision", lambda: self._set(skip_modules=wanted))()
                chip.value = name in self._skips()

        chip.observe(toggle, "value")
        return chip


class WorkloadPanel:
    """Context length and batch size.

    Attributes:
        box: What is shown.
    """

    def __init__(self, state: State) -> None:
        self.context = classed(
            w.IntText(
                description="Context",
                continuous_update=False,
                tooltip="Tokens of prompt and answer together, for each sequence",
            ),
            "wb-context",
            "wb-wide",
        )
        self.batch = classed(
            w.IntText(description="Batch", continuous_update=False, tooltip="Sequences at a time"),
            "wb-batch",
            "wb-wide",
        )
        note = html("wb-note", value="What the KV cache and the activations are for, in tokens and sequences.")
        self.box = panel("Workload", [self.context, self.batch, note, problem_line(state, "workload")])
        for control, option in ((self.context, "context_length"), (self.batch, "batch_size")):
            bind(
                control,
                state,
                "workload",
                show=lambda option=option: getattr(state.recipe.workload, option),  # type: ignore[misc]
                write=lambda value, option=option: state.update(  # type: ignore[misc]
                    workload=dataclasses.replace(state.recipe.workload, **{option: value})
                ),
            )


def _dropdown(label: str, options: tuple[Any, ...], name: str, tip: str) -> Any:
    return classed(w.Dropdown(description=label, options=options, tooltip=tip), name, "wb-wide")
