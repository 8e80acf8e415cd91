"""Which columns of a model's hidden states int8 would multiply in 16 bits, at which threshold, and what that costs.

LLM.int8() looks at the input of each quantized linear module: a column in which any number's magnitude reaches the
threshold is multiplied in 16 bits, the others in 8. Few such columns are cheap and save what quantization would lose;
many make int8 slow.
"""

from __future__ import annotations

import bisect
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from workbench.casts import left_alone
from workbench.model import refuses_unknown
from workbench.precision import Int8
from workbench.session import in_worker
from workbench.skeleton import turn

if TYPE_CHECKING:
    from workbench.session import Session

DEFAULT_THRESHOLD = Int8().threshold


@dataclass(frozen=True, kw_only=True)
class ModuleOutliers:
    """The input of one linear module, over the tokens of a prompt.

    Attributes:
        name: Its full name.
        layer: The number of its decoder layer; None outside of them.
        rows: Its outputs: what a column costs.
        peaks: For each column of its input the largest magnitude over all tokens, ascending.
    """

    name: str
    layer: int | None
    rows: int
    peaks: tuple[float, ...] = field(repr=False)

    @property
    def largest(self) -> float:
        """The largest magnitude of all."""
        return self.peaks[-1]

    @property
    def typical(self) -> float:
        """The magnitude that half of the columns stay below."""
        return self.peaks[len(self.peaks) // 2]

    def above(self, threshold: float) -> int:
        """How many columns are multiplied in 16 bits at a threshold; 0 is off, and none then."""
        return len(self.peaks) - bisect.bisect_left(self.peaks, threshold) if threshold > 0 else 0


@dataclass(frozen=True, kw_only=True)
class OutlierReport:
    """What a prompt showed.

    Attributes:
        prompt: The prompt.
        tokens: How many tokens it was, template included.
        threshold: Which threshold the sentences speak of.
        modules: The modules that int8 quantizes, in the order of the model.
    """

    prompt: str
    tokens: int
    threshold: float
    modules: tuple[ModuleOutliers, ...]

    def share(self, threshold: float | None = None, layer: int | None = None) -> float:
        """The part of the multiplications that is done in 16 bits, 0 to 1.

        Args:
            threshold: Another than the report's own.
            layer: Of one decoder layer; None is the whole model.
        """
        at = self.threshold if threshold is None else threshold
        chosen = [m for m in self.modules if layer is None or m.layer == layer]
        whole = sum(m.rows * len(m.peaks) for m in chosen)
        return sum(m.rows * m.above(at) for m in chosen) / max(1, whole)

    @property
    def layers(self) -> tuple[int, ...]:
        """The numbers of the decoder layers."""
        return tuple(sorted({m.layer for m in self.modules if m.layer is not None}))

    def largest(self, layer: int) -> float:
        """The largest magnitude that goes into any of a layer's modules."""
        return max(m.largest for m in self.modules if m.layer == layer)

    def typical(self, layer: int) -> float:
        """What half of the columns of a layer's modules stay below."""
        peaks = sorted(peak for m in self.modules if m.layer == layer for peak in m.peaks)
        return peaks[len(peaks) // 2]

    @property
    def lines(self) -> tuple[str, ...]:
        """The findings in plain sentences."""
        worst = max(self.modules, key=lambda m: m.largest)
        dearest = max(self.modules, key=lambda m: m.above(self.threshold) / len(m.peaks))
        half = sorted(m.typical for m in self.modules)[len(self.modules) // 2]
        up_to = f"{self.tokens} tokens: magnitudes up to {worst.largest:.4g} (into {worst.name})"
        said = [f"{up_to}; half of all columns stay below {half:.2g}."]
        if self.threshold <= 0:
            said.append("At threshold 0 everything is multiplied in 8 bits.")
            return tuple(said)
        said.append(
            f"At threshold {self.threshold:g}, {self.share():.2%} of the multiplications are in 16 bits, at most "
            f"{dearest.above(self.threshold) / len(dearest.peaks):.1%} of the columns of a module ({dearest.name})."
        )
        return tuple(said)


@refuses_unknown
def outliers(session: Session, prompt: str, *, threshold: float | None = None) -> OutlierReport:
    """Read a prompt and note the magnitudes that go into every module that int8 quantizes.

    Args:
        session: A loaded model, in any precision.
        prompt: Put as :meth:`Session.generate` puts it.
        threshold: What the report's sentences speak of; None is the recipe's own, or 6.0.

    Returns:
        The report. Its numbers hold for this prompt read at once; in decoding each token is looked at by itself.

    Raises:
        ValueError: If the model is unloaded or has no tokenizer, the prompt is empty, or the threshold is out of range.
    """
    if threshold is None:
        threshold = getattr(session.placement.precision, "threshold", DEFAULT_THRESHOLD)
    threshold = Int8(threshold=threshold).threshold
    return in_worker(lambda: _read(session, prompt, threshold))


def _read(session: Session, prompt: str, threshold: float) -> OutlierReport:
    import torch

    from workbench.gptq_layers import linear_shape

    inputs = session._encode(prompt, None)  # noqa: SLF001 - one package
    skeleton, model = session.skeleton, session.model
    plain = skeleton.plain_model().module
    precision = session.placement.precision
    skipped = left_alone(skeleton, precision if isinstance(precision, Int8) else Int8())
    names = [name for name in skeleton.linear_modules if name not in skipped]
    peaks: dict[str, Any] = {}

    def note(name: str) -> Any:
        def hook(_: Any, args: tuple[Any, ...]) -> None:
            # bitsandbytes, too, looks at them in float16.
            found = args[0].detach().to(torch.float16).abs().reshape(-1, args[0].shape[-1]).amax(0).float().cpu()
            peaks[name] = torch.maximum(peaks[name], found) if name in peaks else found

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
    try:
        with turn.work(), torch.inference_mode():
            device = session._input_device()  # noqa: SLF001 - likewise
            model(**{key: value.to(device) for key, value in inputs.items()}, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    order = {block: number for number, block in enumerate(skeleton.decoder_blocks)}
    return OutlierReport(
        prompt=prompt,
        tokens=int(inputs["input_ids"].shape[1]),
        threshold=threshold,
        modules=tuple(
            ModuleOutliers(
                name=name,
                layer=_layer_of(name, order),
                rows=linear_shape(plain.get_submodule(name))[0],
                peaks=tuple(sorted(peaks[name].tolist())),
            )
            for name in names
            if name in peaks  # an expert that no token asked for says nothing
        ),
    )


def _layer_of(name: str, order: dict[str, int]) -> int | None:
    for match in re.finditer(r"\.", name):
        if name[: match.start()] in order:
            return order[name[: match.start()]]
    return None
