"""Quantize a model with GPTQ into a folder that is a model like any other."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.calibration import (
    EVALUATION_LENGTH,
    OFFLINE,
    CalibrationText,
    calibration_sequences,
    evaluation_sequences,
    fitted,
)
from workbench.gptq_folder import write_folder
from workbench.gptq_layers import Layers, linear_shape, replace_weight
from workbench.gptq_packing import packed_linear
from workbench.gptq_plan import plan_quantization
from workbench.kernels import import_gptqmodel
from workbench.loading import load, read_tokenizer
from workbench.model import refuses_unknown
from workbench.precision import GPTQ, precision_to_dict
from workbench.saving import check_target, full_disk_said, move_into_place, originals
from workbench.session import Cancelled, Progress, in_worker
from workbench.skeleton import read_skeleton, turn
from workbench.threads import SpareThreads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from workbench.gptq_layers import RoundedModule
    from workbench.hardware import Machine
    from workbench.recipe import Recipe

_EVALUATIONS = 8  # sequences to measure with
_STATE = "state.json"


@dataclass(frozen=True, kw_only=True)
class QuantizeProgress(Progress):
    """How far a quantization is: ``stage`` is ``"plan"``, ``"read"``, ``"measure"``, ``"quantize"`` or ``"save"``.

    Attributes:
        module: The module that has just been quantized, or None.
        error: Its relative output error, or None.
        seconds_left: An estimate from what has been done so far, or None.
    """

    module: str | None = None
    error: float | None = None
    seconds_left: float | None = None


@dataclass(frozen=True, kw_only=True)
class ModuleReport:
    """What became of one module.

    Attributes:
        name: Its full name.
        layer: The number of its decoder layer.
        shape: (out, in).
        error: The norm of the change of its output on calibration tokens, by that of the output: 0.05 is 5 %.
        tokens: Calibration tokens that it saw; 0 is an expert that was never asked, rounded to nearest.
        seconds: That it took.
    """

    name: str
    layer: int
    shape: tuple[int, int]
    error: float
    tokens: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class QuantizeReport:
    """What a quantization came to.

    Attributes:
        folder: The new model.
        precision: What it was quantized to.
        calibration: With what.
        before_bytes: Weights of the original, each tensor once.
        after_bytes: Weights in the new folder.
        seconds: From the start to the folder in its place.
        modules: Each quantized module, in the order in which they were done.
        perplexity_before: Of the original on held-back text; None if it was not measured.
        perplexity_after: Of the quantized weights on the same text.
        evaluation_tokens: How much text that was.
        resumed_layers: Layers that an interrupted run had already done.
        lines: The findings in plain sentences.
    """

    folder: str
    precision: GPTQ
    calibration: CalibrationText
    before_bytes: int
    after_bytes: int
    seconds: float
    modules: tuple[ModuleReport, ...]
    perplexity_before: float | None
    perplexity_after: float | None
    evaluation_tokens: int
    resumed_layers: int
    lines: tuple[str, ...]

    def worst(self, count: int = 5) -> tuple[ModuleReport, ...]:
        """The modules whose output changed most, the worst first: candidates for ``skip_modules``."""
        known = [m for m in self.modules if not math.isnan(m.error)]
        return tuple(sorted(known, key=lambda m: -m.error)[:count])

    def layer_errors(self) -> dict[str, list[float | None]]:
        """The error of each kind of module in each layer, for a chart: ``{"self_attn.q_proj": [0.02, ...], ...}``."""
        count = 1 + max(m.layer for m in self.modules)
        series: dict[str, list[float | None]] = {}
        for m in self.modules:
            kind = m.name.split(f".{m.layer}.", 1)[-1]
            series.setdefault(kind, [None] * count)[m.layer] = None if math.isnan(m.error) else m.error
        return series

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as it is saved beside the model."""
        data = asdict(self)
        data["precision"] = precision_to_dict(self.precision)
        data["calibration"] = self.calibration.to_dict()
        for m in data["modules"]:
            m["error"] = None if math.isnan(m["error"]) else m["error"]
        return data


@refuses_unknown
def quantize(
    recipe: Recipe,
    output_dir: str | Path,
    *,
    calibration: Any = OFFLINE,
    evaluation: Any = OFFLINE,
    batch_size: int = 8,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    machine: Machine | None = None,
    progress: Callable[[QuantizeProgress | Progress], None] | None = None,
    cancel: threading.Event | None = None,
) -> QuantizeReport:
    """Quantize a model with GPTQ and save it as a folder that loads like any other model.

    Nothing appears at ``output_dir`` before it is whole. A run that is killed leaves a hidden folder beside it, from
    which the same run goes on; a run that is cancelled or fails leaves nothing.

    Args:
        recipe: The model, where its weights go meanwhile (``strategy``, ``max_memory``, ``device_map``), and
            ``precision=GPTQ(...)``.
        output_dir: The new folder.
        calibration: What to calibrate with: a :class:`CalibrationText`, or just its ``source``.
        evaluation: What to measure the perplexity with, before and after; None measures nothing.
        batch_size: Sequences that go through a layer at a time.
        max_shard_size: Of one weight file, as ``save_pretrained`` takes it.
        overwrite: Replace the folder if it exists.
        machine: This machine as the preview saw it; None looks afresh.
        progress: Called from the worker thread.
        cancel: Set it to stop; it stops within one module.

    Returns:
        The report, which is in the folder as well (``quantize_report.json``).

    Raises:
        ValueError: If the model cannot be quantized so, or not here; the sentence says what to do.
        Cancelled: If ``cancel`` was set.
    """
    cancel = cancel or threading.Event()
    job = _Job(
        recipe=recipe,
        output=Path(output_dir).expanduser().absolute(),
        calibration=CalibrationText.parse(calibration),
        evaluation=None if evaluation is None else CalibrationText.parse(evaluation),
        batch_size=batch_size,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        machine=machine,
        progress=progress or (lambda _: None),
        cancel=cancel,
    )
    return in_worker(job.run, cancel.set)


def perplexity(model: Any, sequences: list[list[int]], check: Callable[[], None] = lambda: None) -> float:
    """The perplexity of a model on token sequences, each on its own: exp of the mean loss of all predicted tokens.

    Args:
        model: A loaded model.
        sequences: Lists of token ids.
        check: Called before each sequence; raises to stop.
    """
    import torch

    embedding = model.get_input_embeddings()
    device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    total, count = 0.0, 0
    for ids in sequences:
        check()
        tokens = torch.tensor([ids], device=embedding.weight.device if device is None else device)
        with torch.inference_mode():
            logits = model(input_ids=tokens, use_cache=False).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits.float(), tokens[0, 1:].to(logits.device), reduction="sum")
        total += float(loss)
        count += len(ids) - 1
    return math.exp(min(total / max(count, 1), 700.0))


# --- the run ----------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Job:
    """One call of :func:`quantize`."""

    recipe: Recipe
    output: Path
    calibration: CalibrationText
    evaluation: CalibrationText | None
    batch_size: int
    max_shard_size: str
    overwrite: bool
    machine: Machine | None
    progress: Callable[[QuantizeProgress | Progress], None]
    cancel: threading.Event
    spare: SpareThreads = field(init=False)

    @property
    def work(self) -> Path:
        """The hidden folder beside the new one in which everything happens."""
        return self.output.parent / f".{self.output.name}.quantizing"

    def check(self) -> None:
        if self.cancel.is_set():
            raise Cancelled("The quantization was cancelled.")

    def tell(self, stage: str, text: str, **more: Any) -> None:
        self.progress(QuantizeProgress(stage=stage, **{"done": 0, "total": None, **more}, text=text))

    def run(self) -> QuantizeReport:
        self.started = time.perf_counter()
        self.tell("plan", "planning")
        plan = plan_quantization(
            self.recipe, calibration=self.calibration, batch_size=self.batch_size, machine=self.machine
        )
        for line in plan.lines:
            self.tell("plan", line)
        if plan.verdict == "does_not_fit":
            raise ValueError(" ".join((plan.summary, *plan.advice)))
        self.precision: GPTQ = self.recipe.precision  # type: ignore[assignment]
        self.skeleton = read_skeleton(self.recipe.model)
        self.targets = plan.targets
        self.kept_bytes = plan.kept_bytes
        import_gptqmodel()
        check_target(
            self.output,
            overwrite=self.overwrite,
            needs_bytes=plan.disk_bytes,
            keeps=originals(self.skeleton.source, self.recipe.model),
            what="Quantizing",
        )
        tokenizer, problem = read_tokenizer(self.skeleton)
        if tokenizer is None:
            raise ValueError(f"{problem}, and calibration text has to be tokenized.")
        self.calibration = fitted(self.calibration, self.skeleton.context_length)
        sequences = calibration_sequences(self.calibration, tokenizer)
        held_back: list[list[int]] = []
        if self.evaluation is not None:
            length = min(EVALUATION_LENGTH, self.skeleton.context_length or EVALUATION_LENGTH)
            held_back = evaluation_sequences(self.evaluation, tokenizer, self.calibration, _EVALUATIONS, length)
        full = plan.placement.recipe
        self.check()
        with self._working_folder(sequences) as finished:
            # accelerate's own offload, whose copies of the weights can be changed.
            session = load(full, machine=self.machine, progress=self.progress, cancel=self.cancel, offload="accelerate")
            try:
                with turn.work(), SpareThreads() as self.spare:
                    return self._quantize(session, tokenizer, sequences, held_back, finished)
            finally:
                session.unload()

    def _quantize(
        self, session: Any, tokenizer: Any, sequences: list[list[int]], held_back: list[list[int]], finished: int
    ) -> QuantizeReport:
        import torch

        before = after = None
        if held_back:
            self.tell("measure", "measuring the original")
            before = perplexity(session.model, held_back, self._pause)
        batches = [
            torch.tensor(sequences[start : start + self.batch_size])
            for start in range(0, len(sequences), self.batch_size)
        ]
        layers = Layers(
            model=session.model,
            names=self.skeleton.decoder_blocks,
            targets=self.targets,
            batches=batches,
            precision=self.precision,
            kept_bytes=self.kept_bytes,
            check=self._pause,
        )
        modules = self._layers(layers, finished)
        if layers.whole:
            self.notes.append("Its layers hand more on than hidden states, so each stage ran the whole model.")
        del layers  # and the calibration states with it
        if held_back:
            self.tell("measure", "measuring the quantized model")
            after = perplexity(session.model, held_back, self._pause)
        self.tell("save", "saving")
        result = self.work / "result"
        before_bytes = sum(parameter.nbytes for parameter in session.model.parameters())
        report = QuantizeReport(
            folder=str(self.output),
            precision=self.precision,
            calibration=self.calibration,
            before_bytes=before_bytes,
            after_bytes=0,
            seconds=0.0,
            modules=tuple(modules),
            perplexity_before=before,
            perplexity_after=after,
            evaluation_tokens=sum(map(len, held_back)),
            resumed_layers=finished,
            lines=(),
        )
        report = write_folder(
            result,
            report,
            recipe=self.recipe,
            skeleton=self.skeleton,
            model=session.model,
            tokenizer=tokenizer,
            layer_files=[self._layer_file(index) for index in range(len(self.targets))],
            max_shard_size=self.max_shard_size,
            started=self.started,
            notes=self.notes,
        )
        self.check()
        move_into_place(result, self.output, aside=self.work / "replaced")
        self.tell("save", f"saved in {self.output}")
        return report

    def _pause(self) -> None:
        self.check()
        turn.pause()
        self.spare.look()

    def _layers(self, layers: Any, finished: int) -> list[ModuleReport]:
        """Quantize every layer, each into a file of its own; those that are there already are only taken over."""
        from safetensors.torch import load_file, save_file

        shapes = {
            name: linear_shape(layers.model.get_submodule(name)) for names in self.targets.values() for name in names
        }
        total = len(shapes)
        size = {name: math.prod(shape) for name, shape in shapes.items()}
        reports: list[ModuleReport] = []
        self.tell("quantize", "running the calibration text up to the first layer", total=total)
        layers.start()
        began, worked = time.perf_counter(), 0
        left = sum(size.values())
        for index, block in enumerate(layers.names):
            names = self.targets[block]
            file = self._layer_file(index)
            if index < finished:
                self._take_over(layers, names, load_file(file))
                done = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
                reports += [
                    ModuleReport(**{**d, "shape": tuple(d["shape"]), "error": _number(d["error"])}) for d in done
                ]
                left -= sum(size[name] for name in names)
                self.tell("quantize", f"layer {index + 1}: done before", done=len(reports), total=total)
                layers.advance(index)
                continue
            tensors: dict[str, Any] = {}
            layer_reports: list[ModuleReport] = []
            for rounded in layers.quantize(index):
                tensors |= rounded.packed.tensors(rounded.name)
                layer_reports.append(self._report(rounded, index, shapes))
                worked += size[rounded.name]
                left -= size[rounded.name]
                seconds_left = (time.perf_counter() - began) / worked * left
                done = len(reports) + len(layer_reports)
                self.tell(
                    "quantize",
                    f"{rounded.name} ({done} of {total}), error {rounded.error:.2%}, {_duration(seconds_left)} left",
                    done=done,
                    total=total,
                    module=rounded.name,
                    error=_none_if_nan(rounded.error),
                    seconds_left=seconds_left,
                )
            layers.advance(index)
            # The reports first: a layer counts as done when its tensors are there.
            plain = [{**asdict(r), "error": _none_if_nan(r.error)} for r in layer_reports]
            file.with_suffix(".json").write_text(json.dumps(plain), encoding="utf-8")
            partial = file.with_suffix(".partial")
            save_file(tensors, partial)
            partial.replace(file)
            reports += layer_reports
        return reports

    def _take_over(self, layers: Any, names: tuple[str, ...], tensors: dict[str, Any]) -> None:
        for name in names:
            replace_weight(layers.model.get_submodule(name), packed_linear(tensors, name), self.precision)

    @staticmethod
    def _report(rounded: RoundedModule, layer: int, shapes: dict[str, tuple[int, int]]) -> ModuleReport:
        return ModuleReport(
            name=rounded.name,
            layer=layer,
            shape=shapes[rounded.name],
            error=rounded.error,
            tokens=rounded.tokens,
            seconds=rounded.seconds,
        )

    # --- folders ------------------------------------------------------------------------------------------------------

    def _layer_file(self, index: int) -> Path:
        return self.work / "layers" / f"{index:05d}.safetensors"

    @contextlib.contextmanager
    def _working_folder(self, sequences: list[list[int]]) -> Iterator[int]:
        """Make or take over the hidden folder; yields how many layers in it are done.

        It is removed at the end, whatever the end is, but for a killed process.
        """
        from filelock import FileLock, Timeout

        self.output.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.work.with_suffix(".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"Another run is already quantizing into {self.output}: wait for it.") from None
        self.notes: list[str] = []
        try:
            with full_disk_said(self.output):
                yield self._found(self._identity(sequences))
        finally:
            shutil.rmtree(self.work, ignore_errors=True)
            lock.release()
            self.work.with_suffix(".lock").unlink(missing_ok=True)

    def _found(self, identity: dict[str, Any]) -> int:
        finished = 0
        state = self.work / _STATE
        if self.work.exists():
            try:
                same = json.loads(state.read_text(encoding="utf-8")) == identity
            except (OSError, ValueError):
                same = False
            if same:
                while self._layer_file(finished).is_file():
                    finished += 1
                self.notes.append(f"An interrupted run had finished {finished} layers: it was continued.")
            else:
                shutil.rmtree(self.work)
                self.notes.append("An interrupted run with other choices was found: this one started afresh.")
            self.tell("plan", self.notes[-1])
        (self.work / "layers").mkdir(parents=True, exist_ok=True)
        state.write_text(json.dumps(identity), encoding="utf-8")
        shutil.rmtree(self.work / "result", ignore_errors=True)
        return finished

    def _identity(self, sequences: list[list[int]]) -> dict[str, Any]:
        """What has to be the same for the layers of one run to go with those of another."""
        import importlib.metadata

        return {
            "model": self.skeleton.source.fingerprint,
            "location": self.skeleton.source.location,
            "precision": precision_to_dict(self.precision),
            "tokens": hashlib.sha256(json.dumps(sequences).encode()).hexdigest(),
            "batch_size": self.batch_size,
            "versions": {name: importlib.metadata.version(name) for name in ("gptqmodel", "torch", "transformers")},
        }


def _number(error: float | None) -> float:
    return float("nan") if error is None else error


def _none_if_nan(error: float) -> float | None:
    return None if math.isnan(error) else error


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
