"""Train a LoRA adapter on a loaded model, whatever its weights are in: a plain loop that can be stopped and resumed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import shutil
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.adapters import Adapter, adapter_from_model, check_all_here, import_peft
from workbench.four_bit import unpack
from workbench.model import refuses_unknown
from workbench.saving import check_target, originals
from workbench.session import Cancelled, Progress, in_worker
from workbench.skeleton import turn
from workbench.threads import SpareThreads
from workbench.training_memory import TrainingPlan, plan_training, upcasts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from workbench.session import Session

_WARM_UP = 0.1  # of the steps
_STATE = "state.pt"
_FORMAT = 2  # of that file


@dataclass(frozen=True, kw_only=True)
class TrainingProgress(Progress):
    """How far a training is: ``stage`` is ``"plan"``, ``"train"`` or ``"save"``, ``done`` are steps.

    Attributes:
        loss: Of the last step, or None.
        losses: Of all steps so far.
        seconds_left: An estimate, or None.
    """

    loss: float | None = None
    losses: tuple[float, ...] = ()
    seconds_left: float | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingReport:
    """What a training came to.

    Attributes:
        adapter: Loaded and active.
        losses: The mean loss of each step's examples.
        seconds: From the start to the end.
        resumed_steps: Steps that an interrupted run had already done.
        plan: What was foretold of its memory.
        lines: The findings in plain sentences.
    """

    adapter: Adapter
    losses: tuple[float, ...]
    seconds: float
    resumed_steps: int
    plan: TrainingPlan
    lines: tuple[str, ...]


@refuses_unknown
@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How an adapter is trained.

    Attributes:
        name: What to call it.
        r: Its rank: how much it can learn, and its size.
        alpha: Its scale: what it adds is multiplied by alpha / r.
        target_modules: ``"auto"`` is every linear module of the decoder layers; else names or their endings, such as
            ``("q_proj", "v_proj")``.
        layers: Numbers of the decoder layers that get it; None is all. The last few alone train faster.
        steps: Times that the adapter is changed.
        batch_size: Texts for each.
        learning_rate: At its highest; it rises for a tenth of the steps and falls to a tenth of this.
        dropout: Of the adapter's input.
        max_length: Tokens of a text; what is longer is cut.
        gradient_checkpointing: Compute the layers twice in place of keeping what is between: slower, much smaller.
        seed: Makes it repeatable.
    """

    name: str = "adapter"
    r: int = 8
    alpha: float = 16.0
    target_modules: str | Sequence[str] = "auto"
    layers: Sequence[int] | None = None
    steps: int = 60
    batch_size: int = 4
    learning_rate: float = 1e-3
    dropout: float = 0.0
    max_length: int = 512
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: If one is out of range.
        """
        for name in ("r", "steps", "batch_size", "max_length"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is a whole number of at least 1, not {value!r}.")
        for name, high in (("alpha", 1e6), ("learning_rate", 1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= high:
                raise ValueError(f"{name} is a number above 0 and at most {high:g}, not {value!r}.")
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is a number from 0 to below 1, not {self.dropout!r}.")
        if not isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
        if not re.fullmatch(r"\w+", str(self.name)):
            raise ValueError(f"An adapter's name is letters, digits and _, not {self.name!r}.")


def train_adapter(
    session: Session,
    texts: Sequence[str | tuple[str, str]],
    *,
    options: TrainingOptions,
    folder: str | Path | None = None,
    overwrite: bool = False,
    progress: Callable[[TrainingProgress], None] | None = None,
    cancel: threading.Event | None = None,
) -> TrainingReport:
    """Train a LoRA adapter; ``session.train_adapter()`` is the way to call it.

    Args:
        session: A loaded model.
        texts: What to learn.
        options: How.
        folder: Where to save it, and beside which to keep what an interrupted run needs to go on.
        overwrite: Replace the folder if it exists.
        progress: Called from the worker thread after each step.
        cancel: Set it to stop after the step that is being done.

    Raises:
        ValueError: If it cannot be trained so; the sentence says what to do.
        Cancelled: If ``cancel`` was set.
    """
    cancel = cancel or threading.Event()
    job = _Job(session, options, None if folder is None else Path(folder).expanduser().absolute(), overwrite=overwrite)
    job.progress, job.cancel = progress or (lambda _: None), cancel
    return in_worker(lambda: job.run(texts), cancel.set)


def preview(session: Session, texts: Sequence[str | tuple[str, str]], options: TrainingOptions) -> TrainingPlan:
    """What a training would take; ``session.plan_training()`` is the way to call it.

    Raises:
        ValueError: As :func:`train_adapter`.
    """
    _check_session(session, options)
    examples, _ = encode_examples(session.tokenizer, texts, options.max_length)
    return plan_training(session, options, tokens=max(len(ids) for ids, _ in examples))


def _check_session(session: Session, options: TrainingOptions) -> None:
    if session.model is None:
        raise ValueError("This model is unloaded: load it again.")
    session.needed_tokenizer(", which texts need.")
    if session.skeleton.is_encoder_decoder:
        raise ValueError("Training is for models that continue text; this one reads with an encoder.")
    check_all_here(session.placement)
    for module in session.model.modules():  # gptqmodel's kernels say so of themselves
        if not getattr(module, "SUPPORTS_TRAINING", True):
            kernel = type(module).__name__
            raise ValueError(f"{kernel} passes no gradients on: load the model again with backend='torch'.")
    if any(adapter.name == options.name for adapter in session.adapters.list()):
        raise ValueError(f"There is an adapter {options.name!r} already: remove it, or pick another name.")


class _Job:
    """One call of :func:`train_adapter`."""

    def __init__(self, session: Session, options: TrainingOptions, folder: Path | None, *, overwrite: bool) -> None:
        self.session, self.options, self.folder, self.overwrite = session, options, folder, overwrite
        self.progress: Callable[[TrainingProgress], None] = lambda _: None
        self.cancel = threading.Event()

    def run(self, texts: Sequence[str | tuple[str, str]]) -> TrainingReport:
        import torch

        began = time.perf_counter()
        session, options = self.session, self.options
        self._check()
        examples, notes = encode_examples(session.tokenizer, texts, options.max_length)
        longest = max(len(ids) for ids, _ in examples)
        plan = plan_training(session, options, tokens=longest)
        self.progress(TrainingProgress(stage="plan", done=0, total=options.steps, text=plan.sentence))
        model = session.model
        peft = import_peft(model)
        with (
            turn.work(),
            _prepared(model, upcast=upcasts(session.placement), checkpointing=options.gradient_checkpointing),
        ):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(options.seed)
                peft_model = _put_in(peft, session, options)
            try:
                with self._kept(examples) as state_file:
                    losses, resumed = self._loop(peft_model, examples, state_file)
                    self._finish(peft_model, losses, resumed)
            except BaseException:
                _take_out(session, peft_model, options.name)
                raise
        adapter = adapter_from_model(
            model, name=options.name, base=session.skeleton.source.location, r=options.r, alpha=options.alpha
        )
        session.adapters.take(adapter, peft_model)
        fell = f"from {_mean(losses[:5]):.2f} to {_mean(losses[-5:]):.2f}"
        lines = [f"{options.name}: the loss went {fell} in {len(losses)} steps.", plan.sentence, *notes]
        if resumed:
            lines.append(f"An interrupted run had done {resumed} steps: it was continued.")
        if self.folder is not None:
            session.adapters.save(options.name, self.folder, overwrite=self.overwrite)
            adapter = next(a for a in session.adapters.list() if a.name == options.name)
            lines.append(f"Saved in {self.folder}.")
        return TrainingReport(
            adapter=adapter,
            losses=tuple(losses),
            seconds=time.perf_counter() - began,
            resumed_steps=resumed,
            plan=plan,
            lines=tuple(lines),
        )

    def _check(self) -> None:
        _check_session(self.session, self.options)
        if self.folder is not None:
            keeps = originals(self.session.skeleton.source, self.session.recipe.model)
            check_target(self.folder, overwrite=self.overwrite, keeps=keeps)

    def _loop(
        self, model: Any, examples: list[tuple[list[int], list[int]]], state_file: Path | None
    ) -> tuple[list[float], int]:
        import torch

        options, session = self.options, self.session
        own = f".{options.name}.weight"  # an interrupted run may go on under another name
        trained = {name.removesuffix(own): p for name, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(trained.values(), lr=options.learning_rate, weight_decay=0.0)
        losses: list[float] = []
        if state_file is not None and state_file.is_file():
            state = torch.load(state_file, weights_only=True)
            for name, tensor in state["weights"].items():
                trained[name].data.copy_(tensor)
            optimizer.load_state_dict(state["optimizer"])
            losses = list(state["losses"])
        resumed = len(losses)
        device = session._input_device()  # noqa: SLF001 - the session's own business, one package
        pad = getattr(session.tokenizer, "pad_token_id", None) or 0
        began = time.perf_counter()
        with torch.random.fork_rng(devices=[]), SpareThreads() as spare:
            while len(losses) < options.steps:
                step = len(losses)
                try:
                    self._stop_here()
                except Cancelled:
                    self._keep(state_file, trained, optimizer, losses)
                    raise
                batch = [examples[i] for i in batch_of(step, len(examples), options.batch_size, options.seed)]
                for group in optimizer.param_groups:
                    group["lr"] = options.learning_rate * _schedule(step, options.steps)
                torch.manual_seed(options.seed + step)  # for dropout, the same after a pause
                inputs = {name: tensor.to(device) for name, tensor in padded(batch, pad).items()}
                loss = model(**inputs, use_cache=False).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                losses.append(float(loss.detach()))
                if math.isnan(losses[-1]):
                    raise ValueError(f"The loss is no number any more at step {step + 1}: lower learning_rate.")
                left = (time.perf_counter() - began) / (len(losses) - resumed) * (options.steps - len(losses))
                self.progress(
                    TrainingProgress(
                        stage="train",
                        done=len(losses),
                        total=options.steps,
                        text=f"step {len(losses)} of {options.steps}, loss {losses[-1]:.3f}, {left:.0f} s left",
                        loss=losses[-1],
                        losses=tuple(losses),
                        seconds_left=left,
                    )
                )
                turn.pause()
                spare.look()
        return losses, resumed

    def _stop_here(self) -> None:
        if self.cancel.is_set():
            raise Cancelled("The training was cancelled.")

    def _finish(self, model: Any, losses: list[float], resumed: int) -> None:
        self.progress(
            TrainingProgress(
                stage="save",
                done=len(losses),
                total=len(losses),
                text=f"{len(losses)} steps done" + (f", {resumed} of them before" if resumed else ""),
                loss=losses[-1],
                losses=tuple(losses),
                seconds_left=0.0,
            )
        )
        model.eval()

    # --- what an interrupted run leaves ---

    @property
    def _work(self) -> Path | None:
        return None if self.folder is None else self.folder.parent / f".{self.folder.name}.training"

    @contextlib.contextmanager
    def _kept(self, examples: list[tuple[list[int], list[int]]]) -> Iterator[Path | None]:
        """The file in which a stopped run waits; another run's is thrown away, and so is this one's at its end."""
        work = self._work
        if work is None:
            yield None
            return
        identity = json.dumps(
            {
                **asdict(replace(self.options, name="any")),
                "format": _FORMAT,
                "model": self.session.skeleton.source.fingerprint,
                "precision": self.session.placement.precision.label,
                "examples": hashlib.sha256(json.dumps(examples).encode()).hexdigest(),
            }
        )
        label = work / "run.json"
        if not label.is_file() or label.read_text(encoding="utf-8") != identity:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            label.write_text(identity, encoding="utf-8")
        try:
            yield work / _STATE
        except BaseException:
            if not (work / _STATE).is_file():
                shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work, ignore_errors=True)

    @staticmethod
    def _keep(state_file: Path | None, trained: dict[str, Any], optimizer: Any, losses: list[float]) -> None:
        import torch

        if state_file is None or not losses:
            return
        partial = state_file.with_suffix(".partial")
        weights = {name: parameter.detach() for name, parameter in trained.items()}
        torch.save({"weights": weights, "optimizer": optimizer.state_dict(), "losses": losses}, partial)
        partial.replace(state_file)


# --- the model, made ready and put back -------------------------------------------------------------------------------


@contextlib.contextmanager
def _prepared(model: Any, *, upcast: bool, checkpointing: bool) -> Iterator[None]:
    """Freeze a model and make it fit to train an adapter on, and put everything back at the end.

    4-bit weights pass gradients on only as they were loaded. What is float16 and not quantized (norms, embeddings,
    head) is float32 meanwhile: in float16, small gradients vanish.
    """
    import torch

    unpack(model)
    dtypes = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if upcast and parameter.dtype == torch.float16 and type(parameter) is torch.nn.Parameter:
            dtypes[name] = (parameter, parameter.dtype)
            parameter.data = parameter.data.float()
    if checkpointing:
        _checkpointing(model, "enable", {"use_reentrant": False})  # else the inputs would need gradients
    model.train()
    try:
        yield
    finally:
        model.eval()
        if checkpointing:
            _checkpointing(model, "disable")
        for parameter, dtype in dtypes.values():
            parameter.data = parameter.data.to(dtype)  # each is the very number that it was
        for parameter in model.parameters():
            parameter.grad = None
            parameter.requires_grad_(False)


def _checkpointing(model: Any, what: str, *arguments: Any) -> None:
    """Switch it on or off, under the name that this version of transformers has for it."""
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{kind}_checkpointing_{what}")(*arguments)


def _put_in(peft: Any, session: Session, options: TrainingOptions) -> Any:
    """PEFT's wrapper with a new adapter in it, which alone is trained."""
    import warnings

    config = peft.LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=list(targets(session, options)),
        task_type="CAUSAL_LM",
        base_model_name_or_path=session.skeleton.source.location,
    )
    held = session.adapters.peft_model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if held is None:
            return peft.get_peft_model(session.model, config, adapter_name=options.name)
        held.add_adapter(options.name, config)
        held.base_model.enable_adapter_layers()
        held.set_adapter(options.name)
    return held


def _take_out(session: Session, peft_model: Any, name: str) -> None:
    """Leave nothing of an adapter that was not finished."""
    if session.adapters.peft_model is None:
        peft_model.unload()
        vars(session.model).pop("peft_config", None)
    else:
        peft_model.delete_adapter(name)
        session.adapters.use(session.adapters.active)


def targets(session: Session, options: TrainingOptions) -> tuple[str, ...]:
    """Full names of the linear modules that get an adapter.

    Raises:
        ValueError: If there are none; close names are offered.
    """
    import difflib

    skeleton = session.skeleton
    blocks = skeleton.decoder_blocks
    if options.layers is not None:
        wrong = [i for i in options.layers if not isinstance(i, int) or not -len(blocks) <= i < len(blocks)]
        if wrong or not options.layers:
            raise ValueError(f"layers are numbers of decoder layers, 0 to {len(blocks) - 1}, not {options.layers!r}.")
        blocks = tuple(blocks[i] for i in options.layers)
    inside = tuple(f"{block}." for block in blocks)
    linear = [name for name in skeleton.linear_modules if name.startswith(inside)]
    wanted = options.target_modules
    if wanted == "auto":
        if not linear:
            raise ValueError(f"{skeleton.architecture} has no linear modules in its layers: name target_modules.")
        return tuple(linear)
    wanted = (wanted,) if isinstance(wanted, str) else wanted
    chosen = []
    for pattern in wanted:
        hits = [name for name in linear if name == pattern or name.endswith(f".{pattern}")]
        if not hits:
            names = sorted({name.rpartition(".")[2] for name in linear})
            close = difflib.get_close_matches(str(pattern), names, n=3) or names[:3]
            raise ValueError(
                f"target_modules: there is no linear module {pattern!r} in the layers; close are "
                f"{', '.join(map(repr, close))}."
            )
        chosen += hits
    return tuple(dict.fromkeys(chosen))


# --- the examples -----------------------------------------------------------------------------------------------------


def encode_examples(
    tokenizer: Any, texts: Sequence[str | tuple[str, str]], max_length: int
) -> tuple[list[tuple[list[int], list[int]]], list[str]]:
    """Token ids and labels of each text; of a pair, only the answer is learnt.

    Args:
        tokenizer: With or without a chat template.
        texts: Each a text, or a pair of question and answer.
        max_length: What is longer is cut.

    Returns:
        The examples, and what there is to say of them.

    Raises:
        ValueError: If there are none, or one is neither.
    """
    if isinstance(texts, str) or not texts:
        raise ValueError("texts is a list of texts, or of (question, answer) pairs.")
    examples, cut = [], 0
    for text in texts:
        if isinstance(text, str) and text.strip():
            ids = list(tokenizer(text)["input_ids"])
            labels = list(ids)
        elif isinstance(text, (tuple, list)) and len(text) == 2 and all(isinstance(t, str) and t for t in text):
            ids, labels = _encode_pair(tokenizer, *text)
        else:
            raise ValueError(f"Each of texts is a text or a (question, answer) pair, not {str(text)[:80]!r}.")
        cut += len(ids) > max_length
        ids, labels = ids[:max_length], labels[:max_length]
        if all(label == -100 for label in labels[1:]):
            raise ValueError(f"Nothing is left to learn of {str(text)[:60]!r}: raise max_length from {max_length}.")
        examples.append((ids, labels))
    return examples, [f"{cut} of {len(texts)} texts were cut to {max_length} tokens."] if cut else []


def _encode_pair(tokenizer: Any, question: str, answer: str) -> tuple[list[int], list[int]]:
    """As ``session.generate()`` puts the question, and then the answer with what ends it."""
    if getattr(tokenizer, "chat_template", None):
        asked = [{"role": "user", "content": question}]
        begun = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": answer}], tokenize=False)
        # Templates may say more about a question that has been answered; then the answer follows it as it stands.
        rest = whole[len(begun) :] if whole.startswith(begun) else answer + (tokenizer.eos_token or "")
        plain = {"add_special_tokens": False}  # the template writes them
    else:
        begun, rest = question, ("" if question[-1:].isspace() else " ") + answer + (tokenizer.eos_token or "")
        plain = {}
    before = list(tokenizer(begun, **plain)["input_ids"])
    after = list(tokenizer(rest.rstrip("\n"), add_special_tokens=False)["input_ids"])
    return before + after, [-100] * len(before) + after


def batch_of(step: int, count: int, batch_size: int, seed: int) -> list[int]:
    """Which examples a step learns from: every one once in each round, in an order of the round's own."""
    import torch

    chosen: list[int] = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        turn_number, index = divmod(position, count)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + turn_number)
        chosen.append(int(torch.randperm(count, generator=generator)[index]))
    return chosen


def padded(batch: list[tuple[list[int], list[int]]], pad: int) -> dict[str, Any]:
    """A batch as tensors of one length."""
    import torch

    length = max(len(ids) for ids, _ in batch)
    rows = [(ids, labels, length - len(ids)) for ids, labels in batch]
    return {
        "input_ids": torch.tensor([ids + [pad] * left for ids, _, left in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * left for ids, _, left in rows]),
        "labels": torch.tensor([labels + [-100] * left for _, labels, left in rows]),
    }


def _schedule(step: int, steps: int) -> float:
    """The learning rate's share: a short rise, then a straight fall to a tenth."""
    rise = max(1, round(_WARM_UP * steps))
    return (step + 1) / rise if step < rise else 1 - 0.9 * (step - rise) / max(1, steps - rise)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))
