"""Read GPTQ folders as AutoGPTQ and GPTQ-for-LLaMa wrote them: any file name, old keys, or no config at all.

Such a folder is left as it is. A folder of links stands beside it in the cache, with the names and the config that
transformers looks for, and everything else reads that one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.checkpoint import read_header
from workbench.precision import GPTQ

if TYPE_CHECKING:
    from workbench.model import ModelRef

STANDARD_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_SAFE = ".safetensors"
_PICKLES = (".bin", ".pt", ".pth")
_SHARD = re.compile(r"^(?P<base>.+)-\d{5}-of-\d{5}$")
# Other programs' leavings that end like weights.
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state", "adapter_model")
_DEAD_KEYS = ("is_marlin_format", "model_name_or_path", "model_file_base_name")
_Headers = dict[str, tuple[Path, tuple[int, ...]]]  # of each tensor: its file and its shape


def weight_basenames(folder: Path) -> dict[str, list[Path]]:
    """The sets of weights in a folder: name without ending and part number to its files, safetensors first.

    Args:
        folder: A model's.
    """
    found: dict[str, list[Path]] = {}
    files = [p for p in sorted(folder.iterdir()) if p.suffix in (_SAFE, *_PICKLES) and p.is_file()]
    for path in sorted(files, key=lambda p: p.suffix != _SAFE):
        shard = _SHARD.match(path.stem)
        base = shard["base"] if shard else path.stem
        if base.startswith(_NO_WEIGHTS):
            continue
        group = found.setdefault(base, [])
        if not group or group[0].suffix == path.suffix:
            group.append(path)
    return found


def staged_folder(folder: Path, ref: ModelRef) -> tuple[Path, tuple[str, ...]]:
    """Where to read a model folder from.

    Args:
        folder: As the user named it.
        ref: With ``model_basename`` and ``quantize_config``, where they were given.

    Returns:
        The folder itself if transformers reads it as it is, else the folder of links; and what was put right, in
        sentences.

    Raises:
        ValueError: If there is no such ``model_basename``, several sets of weights and none is named, or the config
            contradicts the tensors.
    """
    config = _read_json(folder / "config.json")
    files = _weights(folder, ref)
    beside = next((folder / n for n in ("quantize_config.json", "quant_config.json") if (folder / n).is_file()), None)
    own = config.get("quantization_config")
    given = ref.quantize_options or (own if isinstance(own, dict) else None) or (_read_json(beside) if beside else None)
    standard = not files or any((folder / name).is_file() for name in STANDARD_NAMES if not ref.model_basename)
    if given is not None and str(given.get("quant_method") or "gptq").lower() != "gptq":
        given = own if isinstance(own, dict) else None  # another method's; transformers knows it or says so
        if standard:
            return folder, ()
    complete = isinstance(own, dict) and not ref.quantize_options and not any(key in own for key in _DEAD_KEYS)
    if standard and (complete or (given is None and not _looks_packed(files))):
        return folder, ()

    notes: list[str] = []
    names = [] if standard else files
    if names:
        notes.append(f"The weights are in {names[0].name}" + (f" and {len(names) - 1} more." if names[1:] else "."))
    if (names or given) and files and files[0].suffix != _SAFE:
        files = names = [_unpickled(files, ref)]
    headers = _headers(files)
    if not names and _group_index(headers):
        names = files
    if any(name.endswith(".qweight") for name in headers):
        options, said = _settled(given, headers, files, folder.name)
        notes += said
        config = {**config, "quantization_config": options}
    elif given is not None:
        config = {**config, "quantization_config": _cleaned(given)}
    return _stage(folder, config, names, headers), tuple(notes)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds no JSON object.")  # noqa: TRY004 - one kind of error for bad input
    return data


def _weights(folder: Path, ref: ModelRef) -> list[Path]:
    """The files of the set of weights that is meant; none where the folder has none."""
    sets = weight_basenames(folder)
    if ref.model_basename:
        wanted = ref.model_basename
        for suffix in (_SAFE, *_PICKLES):
            wanted = wanted.removesuffix(suffix)
        if wanted not in sets:
            offered = ", ".join(map(repr, sets)) or "none"
            raise ValueError(f"{folder} has no weights named {ref.model_basename!r}; there are: {offered}.")
        return sets[wanted]
    for name in STANDARD_NAMES:
        if (folder / name).is_file():
            return sets.get(name.split(".", 1)[0], [])
    if len(sets) > 1:
        raise ValueError(
            f"{folder} has several sets of weights; name one with ModelRef(name=..., model_basename=...): "
            f"{', '.join(map(repr, sets))}."
        )
    return next(iter(sets.values()), [])


def _looks_packed(files: list[Path]) -> bool:
    if not files or files[0].suffix != _SAFE:
        return False
    try:
        return any(name.endswith(".qweight") for name in _headers(files[:1]))
    except ValueError:  # reported when the weights are to be read: a damaged model can be previewed
        return False


def _headers(files: list[Path]) -> _Headers:
    """Where every tensor is and its shape, without reading any."""
    found: _Headers = {}
    for path in files:
        found |= {name: (path, tuple(entry["shape"])) for name, entry in read_header(path).items()}
    return found


def _unpickled(files: list[Path], ref: ModelRef) -> Path:
    """A pickle's tensors as safetensors in the cache, if its author is trusted; only tensors are read from it."""
    from workbench.model import cache_folder

    if not ref.allow_pickle:
        raise ValueError(
            f"{files[0].name} is a pickle, which can run code while it is read; if you trust its author, say so with "
            "ModelRef(name=..., allow_pickle=True)."
        )
    stamp = json.dumps([[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files])
    key = hashlib.sha256(stamp.encode()).hexdigest()[:16]
    target = cache_folder() / "staged" / f"{files[0].stem}-{key}.safetensors"
    if target.is_file():
        return target
    import pickle

    import torch
    from safetensors.torch import save_file

    tensors: dict[str, Any] = {}
    for path in files:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(f"{path.name} holds more than tensors or is damaged, and is not read: {error}") from None
        loaded = loaded.get("state_dict", loaded)
        tensors |= {name: t.contiguous().clone() for name, t in loaded.items() if isinstance(t, torch.Tensor)}
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as partial:
        save_file(tensors, Path(partial) / target.name, metadata={"format": "pt"})
        (Path(partial) / target.name).rename(target)
    return target


def _cleaned(options: dict[str, Any]) -> dict[str, Any]:
    precision = GPTQ.from_config(options)
    kept = {k: v for k, v in options.items() if k not in _DEAD_KEYS}
    return {**kept, "quant_method": "gptq", "checkpoint_format": precision.format}


def _settled(
    given: dict[str, Any] | None,
    headers: _Headers,
    files: list[Path],
    title: str,
) -> tuple[dict[str, Any], list[str]]:
    """A complete config from what was said and what the tensors show, which must not contradict each other."""
    shown = _shown(headers, title)
    notes = []
    if given is None:
        values = _looked_at(headers, files)
        options = {**shown, **values, "quant_method": "gptq"}
        notes.append(
            f"No config says how this is quantized; its tensors do: {shown['bits']} bits, "
            f"{'whole rows' if shown['group_size'] == -1 else 'groups of ' + str(shown['group_size'])}, "
            f"{'symmetric' if values['sym'] else 'asymmetric'}, act-order {'on' if values['desc_act'] else 'off'}."
        )
    else:
        options = _cleaned(given)
        said_groups = options.get("group_size", 128)
        if options["bits"] != shown["bits"] or (said_groups != shown["group_size"] and shown["group_size"] is not None):
            raise ValueError(
                f"The config of {title} says {options['bits']} bits and group_size={said_groups}, but its tensors are "
                f"those of {shown['bits']} bits and group_size={shown['group_size']}: correct it with "
                f"ModelRef(name=..., quantize_config={{'bits': {shown['bits']}, 'group_size': {shown['group_size']}}})."
            )
        options.setdefault("group_size", shown["group_size"])
        dead = [key for key in _DEAD_KEYS if key in given]
        if dead:
            notes.append(f"Its config was completed; {', '.join(dead)} mean nothing any more.")
    linear = {name.removesuffix(".weight") for name in headers if name.endswith(".weight")}
    packed = [name.removesuffix(".qweight") for name in headers if name.endswith(".qweight")]
    blocks = {m[1] for m in (re.match(r"^(.+?)\.\d+\.", name) for name in packed) if m}
    if len(blocks) == 1:
        block = blocks.pop()
        options.setdefault("block_name_to_quantize", block)
        plain = {n for n in linear if n.startswith(f"{block}.") and len(headers[f"{n}.weight"][1]) == 2}
        if plain and not options.get("modules_in_block_to_quantize"):
            options["modules_in_block_to_quantize"] = [sorted(packed)]
            notes.append(f"{len(plain)} linear modules in its layers are not quantized.")
    return options, notes


def _shown(headers: _Headers, title: str) -> dict[str, Any]:
    """Bits and group size, from the shapes of the packed tensors."""
    found: set[tuple[int, int | None]] = set()
    for name, (_, shape) in headers.items():
        if not name.endswith(".qweight"):
            continue
        module = name.removesuffix(".qweight")
        words, outputs = shape
        missing = [end for end in (".qzeros", ".scales") if module + end not in headers]
        if missing:
            raise ValueError(
                f"{title} packs {module} without {' and '.join(missing)}, as GPTQ-for-LLaMa did at the very first: "
                "that layout is not read; quantize the original again."
            )
        groups = headers[f"{module}.scales"][1][0]
        # The zero points are packed along the outputs with the same bits.
        bits = headers[f"{module}.qzeros"][1][1] * 32 // outputs
        inputs = words * 32 // bits
        found.add((bits, None if groups == 1 else -(-inputs // groups)))
    bits_found = {bits for bits, _ in found}
    groups_found = {size for _, size in found}
    if len(bits_found) > 1 or len(groups_found) > 1:
        raise ValueError(
            f"The modules of {title} are quantized differently ({sorted(map(str, found))}), which is not read."
        )
    bits, group_size = found.pop()
    return {"bits": bits, "group_size": -1 if group_size is None else group_size}


def _looked_at(headers: _Headers, files: list[Path]) -> dict[str, Any]:
    """Symmetry, act-order and format, from the values of the packed tensors."""
    import torch
    from safetensors import safe_open

    from workbench.gptq_packing import unpack_values

    shown = _shown(headers, "")
    bits = shown["bits"]
    zeros: set[int] = set()
    ordered = True
    for path in files:
        with safe_open(str(path), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                if name.endswith(".qzeros"):
                    zeros |= set(torch.unique(unpack_values(file.get_tensor(name).t().contiguous(), bits)).tolist())
                elif name.endswith(".g_idx"):
                    g_idx = file.get_tensor(name)
                    size = g_idx.numel() if shown["group_size"] == -1 else shown["group_size"]
                    ordered = ordered and torch.equal(g_idx.long(), torch.arange(g_idx.numel()) // size)
    middle = 2 ** (bits - 1)
    # A symmetric zero point lies in the middle, and v1 stores it less one.
    layout = "gptq_v2" if zeros == {middle} else "gptq"
    return {"sym": zeros in ({middle}, {middle - 1}), "desc_act": not ordered, "checkpoint_format": layout}


def _stage(
    folder: Path,
    config: dict[str, Any],
    names: list[Path],
    headers: _Headers,
) -> Path:
    """Make the folder of links, or find it as it was made before."""
    from workbench.model import cache_folder

    folder = folder.resolve()
    entries = [p for p in sorted(folder.iterdir()) if not p.name.startswith(".")]
    stamp = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in entries]
    key = hashlib.sha256(json.dumps([str(folder), stamp, config, [p.name for p in names]]).encode()).hexdigest()[:16]
    target = cache_folder() / "staged" / f"{folder.name}-{key}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=target.parent))
    try:
        links = {p.name: p for p in entries if p.name != "config.json"}
        if names:  # the others would be taken for this model's
            links = {n: p for n, p in links.items() if p.suffix not in (_SAFE, *_PICKLES) and n not in STANDARD_NAMES}
            links |= _arranged(names, headers, partial)
        for name, path in links.items():
            _link(path, partial / name)
        (partial / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        partial.rename(target)
    except OSError:
        if not target.is_dir():  # else another process was faster
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _arranged(files: list[Path], headers: _Headers, target: Path) -> dict[str, Path]:
    """Give weight files the names that transformers looks for: the links to make."""
    extra = _group_index(headers)
    safe = files[0].suffix == _SAFE
    if len(files) == 1 and not extra:
        return {"model.safetensors" if safe else "pytorch_model.bin": files[0]}
    if not safe:
        raise ValueError(f"{files[0].name} is one of several pickles, which are not read under names of their own.")
    count = len(files) + bool(extra)
    names = {path: f"model-{number:05d}-of-{count:05d}.safetensors" for number, path in enumerate(files, 1)}
    weight_map = {name: names[path] for name, (path, _) in headers.items()}
    if extra:
        from safetensors.torch import save_file

        last = f"model-{count:05d}-of-{count:05d}.safetensors"
        save_file(extra, target / last, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(extra, last)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (target / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    return {name: path for path, name in names.items()}


def _group_index(headers: _Headers) -> dict[str, Any]:
    """The plain group index for modules that have none, in files from before act-order."""
    lacking = [name.removesuffix(".qweight") for name in headers if name.endswith(".qweight")]
    lacking = [module for module in lacking if f"{module}.g_idx" not in headers]
    if not lacking:
        return {}
    import torch

    bits = _shown(headers, "")["bits"]
    tensors = {}
    for module in lacking:
        inputs = headers[f"{module}.qweight"][1][0] * 32 // bits
        groups = headers[f"{module}.scales"][1][0]
        tensors[f"{module}.g_idx"] = (torch.arange(inputs) // -(-inputs // groups)).int()
    return tensors


def _link(path: Path, link: Path) -> None:
    try:
        link.symlink_to(path, target_is_directory=path.is_dir())
    except OSError:  # Windows, for those who may not make links
        if path.is_dir():
            shutil.copytree(path, link)
        else:
            try:
                os.link(path, link)
            except OSError:
                shutil.copy2(path, link)
