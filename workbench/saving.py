"""Save a loaded model as a folder that loads to the same weights, and share it.

What is quantized while it is loaded (bitsandbytes) is saved as it is: the folder needs no original and no second
quantization. GPTQ and its like are folders from the beginning.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import tempfile
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.four_bit import unpack
from workbench.hardware import format_bytes
from workbench.model import DEMO, ModelRef
from workbench.session import Cancelled, in_worker
from workbench.skeleton import turn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from workbench.model import Source
    from workbench.session import Session


def save(session: Session, folder: str | Path, *, overwrite: bool = False, max_shard_size: str = "5GB") -> Path:
    """Write a session's model with everything that belongs to it.

    Args:
        session: A loaded model.
        folder: The new folder; nothing appears there before it is whole.
        overwrite: Replace the folder if it exists.
        max_shard_size: Of one weight file, as ``save_pretrained`` takes it.

    Returns:
        The folder.

    Raises:
        ValueError: If the model cannot be saved as it is, or not there; the sentence says what to do.
    """
    target = Path(folder).expanduser().absolute()
    _check_adapters(session)
    _check(session)
    write_folder(
        lambda made: _write(session, made, max_shard_size),
        target,
        overwrite=overwrite,
        needs_bytes=session.placement.total_bytes,
        keeps=originals(session.skeleton.source, session.recipe.model),
    )
    return target


def push(session: Session, repo_id: str, *, private: bool, token: str | None) -> str:
    """Upload a session's model: the folder that it was loaded from, or what became of it while it was loaded.

    Args:
        session: A loaded model.
        repo_id: ``"org/name"``, or ``"name"`` for the owner of the token.
        private: Make the repository private.
        token: A token with write access, or None.

    Returns:
        The repository's address.

    Raises:
        ValueError: If there is nothing to upload, or the Hub does not take it.
    """
    from workbench.model import find_model
    from workbench.upload import push_folder

    _check_adapters(session)
    source = session.skeleton.source
    as_it_came = session.recipe.precision.package is None or session.skeleton.quantized_as is not None
    if as_it_came and not session.changed:
        return push_folder(source, repo_id, private=private, token=token)
    with tempfile.TemporaryDirectory(prefix="workbench-upload-") as above:
        folder = save(session, Path(above) / source.title.rpartition("/")[2])
        return push_folder(find_model(str(folder)), repo_id, private=private, token=token)


def make_savable(model: Any) -> None:
    """Let a model that was loaded from quantized weights be saved again, which transformers (5.23) refuses.

    It would undo what it did to the checkpoint's tensors, and reading bitsandbytes' has no way back, nor needs one.

    Args:
        model: Just loaded.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if conversions:
        model._weight_conversions = [  # noqa: SLF001 - where transformers keeps them for saving
            conversion
            for conversion in conversions
            if not any(type(op).__name__.endswith("Deserialize") for op in getattr(conversion, "operations", ()))
        ]


def originals(source: Source, named: ModelRef) -> tuple[Path, ...]:
    """What must be there still when a folder has been replaced: a model on this machine.

    Args:
        source: Where it was found, which may be a folder of links to its files.
        named: As the user named it.
    """
    if not source.is_local:
        return ()
    folder = Path(source.location)
    given = () if named.name == DEMO else (Path(named.name).expanduser(),)
    return (folder, *given, *(folder / file.name for file in source.files))


def write_folder(
    write: Callable[[Path], None], target: Path, *, overwrite: bool, needs_bytes: int, keeps: Iterable[Path]
) -> None:
    """Have the worker write a new folder; if the waiting thread is interrupted, nothing of it stays.

    Args:
        write: Fills the folder that it is given.
        target: As for :func:`new_folder`, like the others.
        overwrite: Likewise.
        needs_bytes: Likewise.
        keeps: Likewise.

    Raises:
        ValueError: As :func:`new_folder`.
    """
    stop = threading.Event()

    def work() -> None:
        with new_folder(target, overwrite=overwrite, needs_bytes=needs_bytes, keeps=keeps) as made:
            write(made)
            if stop.is_set():
                raise Cancelled("Saving was cancelled.")

    in_worker(work, stop.set)


@contextlib.contextmanager
def new_folder(target: Path, *, overwrite: bool, needs_bytes: int, keeps: Iterable[Path] = ()) -> Iterator[Path]:
    """Make a folder beside its place, and move it there when the block ends well; else nothing is left of it.

    Args:
        target: Where it will be.
        overwrite: Replace what is there.
        needs_bytes: What will be written.
        keeps: As for :func:`check_target`.

    Yields:
        The folder to write into.

    Raises:
        ValueError: As :func:`check_target`; or if the disk is full in the end all the same.
    """
    check_target(target, overwrite=overwrite, needs_bytes=needs_bytes, keeps=keeps)
    with full_disk_said(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as work:
            made = Path(work) / "new"
            made.mkdir()
            yield made
            move_into_place(made, target, aside=Path(work) / "old")


def check_target(
    target: Path, *, overwrite: bool, needs_bytes: int = 0, keeps: Iterable[Path] = (), what: str = "Saving"
) -> None:
    """Make sure that a folder can be written.

    Args:
        target: Where it will be.
        overwrite: Whether what is there may be replaced.
        needs_bytes: What will be written.
        keeps: Files and folders that are in use: a folder that is one of them, or holds one, is never replaced.
        what: Is being done, as the beginning of a sentence.

    Raises:
        ValueError: If something is there that has to stay, or the disk has too little room.
    """
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file: name a folder.")
    for kept in keeps if target.exists() else ():
        real = kept.resolve()
        # Not by their names, which may be written in several ways on some systems.
        if any(place.exists() and place.samefile(target) for place in (real, *real.parents)):
            verb = "is" if real.is_dir() and real.samefile(target) else "holds"
            raise ValueError(f"{target} {verb} the model itself: name another folder.")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise ValueError(f"{target} exists: name a new folder, or say overwrite=True to replace it.")
    above = next(parent for parent in target.parents if parent.exists())
    free_bytes = shutil.disk_usage(above).free
    if needs_bytes > free_bytes:
        raise ValueError(
            f"{what} needs up to {format_bytes(needs_bytes)} of disk space in {above}, and {format_bytes(free_bytes)} "
            "are free: make room, or name a folder on another disk."
        )


@contextlib.contextmanager
def full_disk_said(target: Path) -> Iterator[None]:
    """Say that the disk is full where that ends the block, in whichever library.

    Args:
        target: What is being written.

    Raises:
        ValueError: In place of the library's error.
    """
    try:
        yield
    except Exception as error:
        told = str(error)
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in told or "os error 28" in told
        if not full:
            raise
        raise ValueError(
            f"The disk with {target.parent} is full; nothing was left there: make room, or name a folder on another "
            "disk."
        ) from error


def move_into_place(made: Path, target: Path, *, aside: Path) -> None:
    """Give a finished folder its place; what is there now goes aside, and comes back if that fails."""
    if target.exists():
        target.rename(aside)
    try:
        made.rename(target)
    except OSError:
        if aside.exists():
            aside.rename(target)
        raise


def front_matter(source: Source, tags: list[str]) -> str:
    """The front matter of a model card for what was made of a model.

    Args:
        source: The original.
        tags: Of the new model.
    """
    from huggingface_hub import ModelCard, ModelCardData

    base: Any = None
    data: dict[str, Any] = {}
    if source.is_local:
        card = Path(source.location) / "README.md"
        if card.is_file():
            with contextlib.suppress(ValueError, OSError):  # somebody's card that cannot be parsed
                data = ModelCard.load(card).data.to_dict()
        base = data.get("base_model")
    else:
        base = source.location
    front = ModelCardData(
        license=source.licence,
        base_model=base,
        language=data.get("language"),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=tags,
    )
    return f"---\n{front.to_yaml()}\n---"


def _check_adapters(session: Session) -> None:
    adapters = session.adapters.list()
    if adapters:
        raise ValueError(
            f"Merge or remove the adapter {adapters[0].name} first; session.adapters.save() writes it by itself."
        )


def _check(session: Session) -> None:
    if session.model is None:
        raise ValueError("This model is unloaded: load it again.")
    skeleton, precision = session.skeleton, session.recipe.precision
    if skeleton.quantized_as is not None and skeleton.quant_method != "bitsandbytes":
        where = skeleton.source.location
        raise ValueError(
            f"{skeleton.source.title} is quantized already ({skeleton.quantized_as}), and loading changed nothing: "
            f"copy {where if skeleton.source.is_local else 'it from the Hub'}."
        )
    if getattr(precision, "has_fp16_weight", False):
        raise ValueError(
            "has_fp16_weight keeps the weights in 16 bits, so there is nothing quantized to save: load the model "
            "without it."
        )


def _write(session: Session, folder: Path, max_shard_size: str) -> None:
    from workbench.gptq_folder import gathered_state

    with turn.work(), quiet_bars():
        unpack(session.model)
        # torchao's tensors are taken apart by transformers, which then has to gather them itself.
        torchao = session.recipe.precision.method == "torchao"
        state = None if torchao else gathered_state(session.model, session._offload)  # noqa: SLF001 - one package
        session.model.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)
        if session.tokenizer is not None:
            session.tokenizer.save_pretrained(folder)
    (folder / "recipe.json").write_text(session.recipe.to_json(), encoding="utf-8")
    (folder / "README.md").write_text(_card(session), encoding="utf-8")


@contextlib.contextmanager
def quiet_bars() -> Iterator[None]:
    """Hold back the bar that transformers draws over the files that it writes, and its warning about offloading."""
    import transformers

    previous = transformers.logging.set_tqdm_hook(
        lambda factory, args, kwargs: factory(*args, **{**kwargs, "disable": True})
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")
            yield
    finally:
        transformers.logging.set_tqdm_hook(previous)


def _card(session: Session) -> str:
    skeleton, placement = session.skeleton, session.placement
    label, package = placement.precision.label, placement.precision.package
    before_bytes = sum(layer.bytes_before for layer in placement.layers)
    rows = [("Precision", f"{label} ({package}), by Workbench" if package else label)]
    skipped = getattr(placement.precision, "skip_modules", ())
    if skipped:
        rows.append(("Left as they were", ", ".join(f"`{name}`" for name in skipped)))
    rows += [("Weights before", format_bytes(before_bytes)), ("Weights after", format_bytes(placement.total_bytes))]
    needs = f"; needs `pip install {package}`" if package else ""
    auto_class = "AutoModelForSeq2SeqLM" if skeleton.is_encoder_decoder else "AutoModelForCausalLM"
    return "\n".join(
        [
            front_matter(skeleton.source, [placement.precision.method, *(["quantized"] if package else [])]),
            "",
            f"# {skeleton.source.title}, {label}",
            "",
            "| | |\n|---|---|",
            *(f"| {name} | {value} |" for name, value in rows),
            "",
            "```python",
            f"from transformers import {auto_class}, AutoTokenizer",
            "",
            f'FOLDER = "."  # this folder, or its id on the Hub{needs}',
            f'model = {auto_class}.from_pretrained(FOLDER, device_map="auto")',
            "tokenizer = AutoTokenizer.from_pretrained(FOLDER)",
            "```",
            "",
        ]
    )
