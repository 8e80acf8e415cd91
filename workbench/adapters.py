"""LoRA adapters beside a loaded model: what they hold, what they cost, and which one speaks."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.four_bit import unpack
from workbench.hardware import format_bytes
from workbench.session import in_worker
from workbench.skeleton import turn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from workbench.placement import Placement
    from workbench.session import Session
    from workbench.skeleton import Skeleton

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TENSOR = re.compile(r"(?P<module>.+)\.(?P<part>lora_[AB])\.weight")


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One LoRA adapter.

    Attributes:
        name: What it is called here, as ``session.adapters.use()`` takes it.
        location: Its folder or Hub id; empty for one that was trained here and is not saved.
        base: The model that it was trained on, as it says itself.
        r: Its rank.
        alpha: Its scale: what it adds is multiplied by alpha / r.
        modules: Module name to (rank, in, out) of what is added there.
    """

    name: str
    location: str
    base: str
    r: int
    alpha: float
    modules: dict[str, tuple[int, int, int]] = field(repr=False)

    @property
    def module_bytes(self) -> dict[str, int]:
        """Module name to the bytes that it takes there: float32, as PEFT keeps adapters whatever their files hold."""
        return {name: 4 * r * (inputs + outputs) for name, (r, inputs, outputs) in self.modules.items()}

    @property
    def size_bytes(self) -> int:
        """All of them."""
        return sum(self.module_bytes.values())


def read_adapter(location: str | Path, name: str | None = None) -> Adapter:
    """Read what an adapter is from its config and the header of its weights.

    Args:
        location: A folder that PEFT's ``save_pretrained`` wrote, or a Hub id.
        name: What to call it; None is its folder's name.

    Raises:
        ValueError: If there is none, it is damaged, or it is no LoRA; the sentence says what to do.
    """
    folder = Path(location).expanduser()
    if folder.is_dir():
        stamp = tuple(
            (path.stat().st_mtime_ns, path.stat().st_size) if path.is_file() else None
            for path in (folder / _CONFIG, folder / _WEIGHTS)
        )
        adapter = _read(folder, str(location), stamp)
    else:
        adapter = _read_on_hub(str(location))
    return adapter if name is None else replace(adapter, name=name)


def read_adapters(locations: Sequence[str]) -> tuple[Adapter, ...]:
    """Several adapters for one model: where some have one name, the second of them is ``name_2``.

    Raises:
        ValueError: As :func:`read_adapter`.
    """
    found: dict[str, Adapter] = {}
    for location in locations:
        adapter = read_adapter(location)
        name, count = adapter.name, 1
        while name in found:
            count += 1
            name = f"{adapter.name}_{count}"
        found[name] = replace(adapter, name=name)
    return tuple(found.values())


def check_base(adapter: Adapter, skeleton: Skeleton) -> None:
    """Make sure that an adapter's matrices are those of a model's modules.

    Raises:
        ValueError: If not; the sentence names both models.
    """
    from workbench.gptq_layers import linear_shape

    module = skeleton.plain_model().module
    linear = set(skeleton.linear_modules)
    for name, (_, inputs, outputs) in adapter.modules.items():
        why = ""
        if name not in linear:
            why = f"{name} is no linear module of it"
        elif (outputs, inputs) != linear_shape(module.get_submodule(name)):
            rows, columns = linear_shape(module.get_submodule(name))
            why = f"{name} is {columns} x {rows} in it, not {inputs} x {outputs}"
        if why:
            raise ValueError(
                f"The adapter {adapter.name} was trained on {base_name(adapter)}, and this model is "
                f"{skeleton.source.title}: {why}. Load it on its own base."
            )


def base_name(adapter: Adapter) -> str:
    """The name of the model that an adapter was trained on; of a folder its last part."""
    return Path(adapter.base).name if Path(adapter.base).is_absolute() else adapter.base


def base_note(adapter: Adapter, skeleton: Skeleton) -> str | None:
    """A warning, where an adapter's matrices fit a model that has another name than its base; else None."""
    names = {Path(name).name.lower() for name in (skeleton.source.location, skeleton.source.title)}
    if Path(adapter.base).name.lower() in names:
        return None
    return (
        f"The adapter {adapter.name} was trained on {base_name(adapter)}; it fits {skeleton.source.title}, but what it "
        "learnt may not."
    )


def adapter_bytes(locations: Sequence[str], skeleton: Skeleton) -> dict[str, int]:
    """Module name to the bytes that adapters take there.

    Args:
        locations: Folders or Hub ids.
        skeleton: The model that they are for.

    Raises:
        ValueError: If one cannot be read or is for another model.
    """
    found: dict[str, int] = {}
    for location in locations:
        adapter = read_adapter(location)
        check_base(adapter, skeleton)
        for name, size in adapter.module_bytes.items():
            found[name] = found.get(name, 0) + size
    return found


class Adapters:
    """The adapters of a session, which is where they are got: ``session.adapters``.

    ``session.model`` stays the same ``transformers`` model; PEFT puts its layers around the linear ones in it.

    Args:
        session: Of which model.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._peft: Any = None
        self._known: dict[str, Adapter] = {}
        self._active: str | None = None

    def __repr__(self) -> str:
        """The names, the active one marked."""
        return f"Adapters({', '.join(f'*{n}' if n == self._active else n for n in self._known) or 'none'})"

    def list(self) -> tuple[Adapter, ...]:
        """What is loaded, in the order in which it was."""
        return tuple(self._known.values())

    @property
    def peft_model(self) -> Any | None:
        """PEFT's wrapper around the session's model; None while there are no adapters."""
        return self._peft

    @property
    def active(self) -> str | None:
        """The name of the one that speaks; None is the base model alone."""
        return self._active

    def load(self, location: str | Path, name: str | None = None) -> Adapter:
        """Load an adapter and make it the active one.

        Args:
            location: A folder that PEFT's ``save_pretrained`` wrote, or a Hub id.
            name: What to call it; None is its folder's name.

        Raises:
            ValueError: If it cannot be read, is for another base, or the name is taken.
        """
        self._check_ready()
        adapter = read_adapter(location, name)
        check_base(adapter, self._session.skeleton)
        self._check_name(adapter.name)
        in_worker(lambda: self._load(adapter))
        self._follow()
        return adapter

    def use(self, name: str | None) -> None:
        """Make one of the loaded adapters the active one, or none: then the base model speaks alone.

        Raises:
            ValueError: If there is no such adapter.
        """
        if name is not None:
            self._named(name)
        in_worker(lambda: self._use(name))

    def remove(self, name: str) -> None:
        """Take an adapter out of memory; if it was the active one, the base model speaks alone.

        Raises:
            ValueError: If there is no such adapter.
        """
        self._named(name)
        in_worker(lambda: self._remove(name))
        self._follow()

    def merge(self, name: str) -> str:
        """Add an adapter into the weights for good; it is no adapter any more then. ``session.save()`` keeps that.

        Returns:
            What came of it, in a sentence: quantized weights are rounded anew.

        Raises:
            ValueError: If there is no such adapter, another is loaded beside it, or the weights cannot take it in.
        """
        adapter = self._named(name)
        others = [other for other in self._known if other != name]
        if others:
            raise ValueError(f"Remove {', '.join(others)} first: merging leaves no layers for other adapters.")
        precision = self._session.placement.precision
        if precision.method in ("gptq", "torchao", "hqq") or self._session.skeleton.is_packed_otherwise:
            raise ValueError(
                f"Weights in {precision.label} cannot take an adapter in: keep it beside them, or merge it on the "
                "original model and quantize that."
            )
        in_worker(self._merge)
        self._follow()
        rounded = "" if precision.package is None else f" The weights were rounded to {precision.label} anew."
        return f"{name} is part of {len(adapter.modules)} modules now.{rounded}"

    def save(self, name: str, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write an adapter as a PEFT folder, which loads with or without Workbench.

        Args:
            name: Which one.
            folder: The new folder; nothing appears there before it is whole.
            overwrite: Replace the folder if it exists.

        Returns:
            The folder.

        Raises:
            ValueError: If there is no such adapter, or it cannot be written there.
        """
        from workbench.saving import originals, write_folder

        adapter = self._named(name)
        target = Path(folder).expanduser().absolute()
        write_folder(
            lambda made: self._save(name, made),
            target,
            overwrite=overwrite,
            needs_bytes=adapter.size_bytes,
            keeps=originals(self._session.skeleton.source, self._session.recipe.model),
        )
        self._known[name] = replace(adapter, location=str(target))
        self._follow()
        return target

    @contextmanager
    def without(self) -> Iterator[None]:
        """For the length of a ``with`` block, the base model speaks alone."""
        before = self._active
        self.use(None)
        try:
            yield
        finally:
            self.use(before)

    # What happens in the worker.

    def _load(self, adapter: Adapter) -> None:
        with turn.work():
            self.take(adapter, _attach(self._session.model, adapter, self._peft))

    def take(self, adapter: Adapter, peft_model: Any) -> None:
        """Count a new adapter in and make it the active one; for those who put it there.

        Args:
            adapter: Already in the model.
            peft_model: PEFT's wrapper around the session's model.
        """
        self._peft = peft_model
        self._known[adapter.name] = adapter
        self._use(adapter.name)

    def _use(self, name: str | None) -> None:
        if self._peft is None:
            return
        tuner = self._peft.base_model
        if name is None:
            tuner.disable_adapter_layers()
        else:
            tuner.enable_adapter_layers()
            with _quiet_peft():
                self._peft.set_adapter(name)
        for parameter in self._session.model.parameters():  # set_adapter makes them trainable
            parameter.requires_grad_(False)
        self._active = name
        self._forget_answers()

    def _forget_answers(self) -> None:
        """Let go of what was computed with other weights and kept for later prompts."""
        for prefix in self._session._prefixes:  # noqa: SLF001 - the session's own business, one package
            prefix.forget()

    def _remove(self, name: str) -> None:
        del self._known[name]
        before = self._active
        if self._known:
            with _quiet_peft():
                self._peft.delete_adapter(name)
            self._use(None if before == name else before)
        else:
            self._leave(self._peft.unload())

    def _merge(self) -> None:
        (name,) = self._known
        with turn.work(), _quiet_peft():
            unpack(self._session.model)
            self._use(name)
            merged = self._peft.merge_and_unload()
        self._session.changed = True
        del self._known[name]
        self._leave(merged)

    def _leave(self, model: Any) -> None:
        """Leave no trace of PEFT in the model, which is one like any other again."""
        vars(model).pop("peft_config", None)
        self._peft = self._active = None
        self._forget_answers()

    def _save(self, name: str, folder: Path) -> None:
        with turn.work(), _quiet_peft():
            self._peft.save_pretrained(folder, selected_adapters=[name], save_embedding_layers=False)
        inner = folder / name
        if inner.is_dir():  # where PEFT puts every adapter that is not called "default"
            for file in inner.iterdir():
                file.replace(folder / file.name)
            inner.rmdir()

    # Checks.

    def _check_ready(self) -> None:
        session = self._session
        if session.model is None:
            raise ValueError("This model is unloaded: load it again.")
        check_all_here(session.placement)

    def _check_name(self, name: str) -> None:
        if not re.fullmatch(r"\w+", name):
            raise ValueError(f"An adapter's name is letters, digits and _, not {name!r}.")
        if name in self._known:
            raise ValueError(f"There is an adapter {name!r} already: remove it, or give this one another name.")

    def _named(self, name: str) -> Adapter:
        if self._session.model is None:
            raise ValueError("This model is unloaded: load it again.")
        if name not in self._known:
            loaded = ", ".join(map(repr, self._known)) or "none"
            raise ValueError(f"There is no adapter {name!r}; loaded: {loaded}.")
        return self._known[name]

    def _follow(self) -> None:
        """Keep the session's recipe in step: it names what has a place on disk or on the Hub."""
        self._session.follow(adapters=tuple(a.location for a in self._known.values() if a.location))


def attach_adapters(model: Any, locations: Sequence[str]) -> Any | None:
    """Put adapters into a model that has none; the last one is active.

    Args:
        model: Just loaded.
        locations: Folders or Hub ids.

    Returns:
        PEFT's wrapper around the model, or None if there are none.
    """
    peft_model = None
    for adapter in read_adapters(locations):
        peft_model = _attach(model, adapter, peft_model)
    return peft_model


def _attach(model: Any, adapter: Adapter, peft_model: Any | None) -> Any:
    peft, folder = import_peft(model), str(_folder(adapter.location))
    with _quiet_peft():
        if peft_model is None:
            return peft.PeftModel.from_pretrained(model, folder, adapter_name=adapter.name)
        peft_model.load_adapter(folder, adapter_name=adapter.name)
    return peft_model


def check_all_here(placement: Placement) -> None:
    """Make sure that every layer is kept where it runs, as adapters need it.

    Raises:
        ValueError: If some wait elsewhere.
    """
    waiting = placement.waiting
    if waiting:
        raise ValueError(
            f"Adapters need every layer where it runs, and {len(waiting)} wait elsewhere ({waiting[0].name}): load the "
            "model with a budget or a precision that keeps them."
        )


def import_peft(model: Any) -> Any:
    """PEFT, ready for a model.

    Args:
        model: PEFT asks gptqmodel about all linear modules but bitsandbytes'.

    Raises:
        ValueError: If it is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise ValueError("Adapters need peft: run `pip install peft`, then restart.")
    bitsandbytes = getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False)
    if not bitsandbytes and all(importlib.util.find_spec(name) for name in ("gptqmodel", "optimum")):
        from workbench.kernels import import_gptqmodel

        import_gptqmodel()  # PEFT would import it, and not quietly
    import peft

    return peft


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """Hold back what PEFT warns of: rounding when merging (said by us), attributes that transformers deprecates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --- an adapter's files -----------------------------------------------------------------------------------------------


def _folder(location: str) -> Path:
    """The folder with an adapter's files, fetched if it is on the Hub."""
    folder = Path(location).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    with _asking_the_hub(location):
        return Path(snapshot_download(location, allow_patterns=[_CONFIG, _WEIGHTS]))


@contextmanager
def _asking_the_hub(location: str) -> Iterator[None]:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", location):
        raise ValueError(f"There is no folder {location}, and it is no Hub id (those look like 'org/name').")
    from huggingface_hub.errors import EntryNotFoundError

    try:
        yield
    except EntryNotFoundError:
        raise ValueError(
            f"{location} lacks {_CONFIG} or {_WEIGHTS} (pickles, which can run code, are not read): name another one."
        ) from None
    except Exception as error:  # noqa: BLE001 - a refused connection is whatever the HTTP library of the day raises
        raise ValueError(
            f"The Hub has no adapter {location}, or cannot be asked ({type(error).__name__}): check the spelling and "
            "the connection, or name a folder."
        ) from None


@functools.lru_cache(maxsize=64)
def _read(folder: Path, location: str, stamp: tuple[Any, ...]) -> Adapter:  # noqa: ARG001 - read anew when it changes
    config = _read_config(folder)
    try:
        shapes = _shapes(folder / _WEIGHTS)
    except ValueError as error:
        raise ValueError(f"The adapter {location} cannot be read: {error}") from None
    return _adapter(location, folder.resolve().name, config, shapes)


@functools.lru_cache(maxsize=64)  # asked once: a slider's every move reads it
def _read_on_hub(location: str) -> Adapter:
    """The same by two small requests: the weights are not fetched before they are loaded."""
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    with _asking_the_hub(location):
        config_file = Path(hf_hub_download(location, _CONFIG))
        kept = try_to_load_from_cache(location, _WEIGHTS)
        tensors = {} if isinstance(kept, str) else HfApi().parse_safetensors_file_metadata(location, _WEIGHTS).tensors
    shapes = _shapes(Path(kept)) if isinstance(kept, str) else {name: tuple(t.shape) for name, t in tensors.items()}
    return _adapter(location, location, _read_config(config_file.parent), shapes)


def _adapter(location: str, name: str, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Adapter:
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, shape in shapes.items():
        match = _TENSOR.fullmatch(key.removeprefix(_PREFIX))
        if match is None or len(shape) != 2:
            raise ValueError(
                f"The adapter {location} holds {key}, which is more than plain LoRA on linear modules: load it with "
                "PEFT itself."
            )
        parts.setdefault(match["module"], {})[match["part"]] = shape
    modules = {}
    for module, found in parts.items():
        if len(found) != 2 or found["lora_A"][0] != found["lora_B"][1]:
            raise ValueError(f"The adapter {location} is damaged: {module} lacks one of its two matrices.")
        modules[module] = (found["lora_A"][0], found["lora_A"][1], found["lora_B"][0])
    if not modules:
        raise ValueError(f"The adapter {location} is empty: fetch it again.")
    r = config.get("r")
    return Adapter(
        name=re.sub(r"\W+", "_", name).strip("_") or "adapter",
        location=location,
        base=str(config.get("base_model_name_or_path") or "a model that it does not name"),
        r=int(r) if isinstance(r, int) else next(iter(modules.values()))[0],
        alpha=float(config.get("lora_alpha") or r or 1),
        modules=modules,
    )


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / _CONFIG
    if not file.is_file():
        raise ValueError(f"{folder} holds no {_CONFIG}: name the folder that PEFT's save_pretrained wrote.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{_CONFIG} of {folder} is damaged ({error}): fetch the adapter again.") from None
    if not isinstance(config, dict) or str(config.get("peft_type", "")).upper() != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise ValueError(f"{folder} is an adapter of type {kind}: Workbench loads LoRA, PEFT itself loads others.")
    return config


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Name to shape of each tensor; the file's length is compared with what its header says."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        pickled = " (pickles, which can run code, are not read)" if file.with_suffix(".bin").is_file() else ""
        raise ValueError(f"it holds no {file.name}{pickled}.")
    try:
        with safe_open(str(file), framework="pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file.name} is damaged or cut short ({error}): fetch it again.") from None


def adapter_from_model(model: Any, *, name: str, base: str, r: int, alpha: float) -> Adapter:
    """What an adapter that was just put into a model is.

    Args:
        model: With PEFT's layers in it.
        name: Of the adapter.
        base: The model's name.
        r: Its rank.
        alpha: Its scale.
    """
    modules = {}
    for path, module in model.named_modules():
        lora = getattr(module, "lora_A", None)
        if lora is not None and name in lora:
            rank, inputs = lora[name].weight.shape
            modules[path] = (int(rank), int(inputs), int(module.lora_B[name].weight.shape[0]))
    return Adapter(name=name, location="", base=base, r=r, alpha=alpha, modules=modules)


def describe(adapter: Adapter) -> str:
    """An adapter in a line: "french: rank 8 on 60 modules, 1.8 MiB, trained on SmolLM2-135M-Instruct"."""
    return (
        f"{adapter.name}: rank {adapter.r} on {len(adapter.modules)} modules, {format_bytes(adapter.size_bytes)}, "
        f"trained on {base_name(adapter)}"
    )
