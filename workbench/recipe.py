"""All the choices and no results: frozen, saved as JSON, printed as plain Python."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from workbench.checkpoint import PACKAGES
from workbench.generation import CACHE_OPTIONS, GenerationOptions
from workbench.hardware import DeviceId, device_label, parse_bytes
from workbench.model import ModelRef, refuses_unknown
from workbench.precision import (
    PRECISIONS,
    FullPrecision,
    Precision,
    precision_from_dict,
    precision_to_dict,
)
from workbench.workload import Workload

if TYPE_CHECKING:
    from workbench.placement import Placement

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential", "packed", "custom")
_VERSION = 1
_KNOBS = ("no_split_module_classes", "fallback_allocation", "offload_buffers", "offload_folder", "adapters")


def _device_key(key: Any) -> DeviceId:
    """Return a device as ``max_memory`` spells it; JSON and people write 0 as "0" or "cuda:0"."""
    if isinstance(key, str):
        text = key.strip().lower().removeprefix("cuda:")
        return int(text) if text.isdecimal() else text
    if isinstance(key, int) and not isinstance(key, bool):
        return key
    raise ValueError(f"A device is a GPU's number, 'mps', 'cpu' or 'disk', not {key!r}.")


def _read_budgets(max_memory: Mapping[Any, int | str]) -> dict[DeviceId, int | str]:
    budgets: dict[DeviceId, int | str] = {}
    for key, value in max_memory.items():
        device = _device_key(key)
        if device in budgets:
            raise ValueError(f"max_memory names {device_label(device)} twice: keep one of the two.")
        parse_bytes(value)
        budgets[device] = value
    return dict(sorted(budgets.items(), key=lambda item: (isinstance(item[0], str), item[0])))


def _counted(name: str) -> list[tuple[bool, int, str]]:
    """Sorts module names as people count: layer 2 before layer 10."""
    parts = name.split(".")
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


@refuses_unknown
@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All the choices of one load, and no results.

    Attributes:
        model: ``"demo"``, a folder, ``"org/name"``, ``"org/name@revision"`` or a :class:`ModelRef`; kept as the latter.
        precision: :class:`FullPrecision`, :class:`Int8`, :class:`FourBit`, :class:`GPTQ`, :class:`TorchAO` or
            :class:`HQQ`.
        strategy: How modules are spread: ``"auto"``, ``"balanced"``, ``"balanced_low_0"``, ``"sequential"`` as
            accelerate names them, ``"packed"`` (ours, see packed.py), or ``"custom"`` with a ``device_map``.
        max_memory: The budget for each device: bytes, or text such as ``"20GiB"``. A device left out is not used. None
            is what is free when it is asked, less each device's named reserve, and never the disk.
        device_map: Only for ``"custom"``: module name to device (0, 1, ..., ``"mps"``, ``"cpu"``, ``"disk"``).
        workload: What the KV cache and the activations are for.
        no_split_module_classes: Classes of modules that the strategies of transformers never split over two devices;
            None is the model's own list.
        fallback_allocation: Let accelerate's planner, in place of transformers', look for any module that fits where
            the next one does not, so that no device stays empty.
        offload_buffers: Offload the buffers of modules that wait on the CPU or disk too; else they stay where the
            modules run.
        offload_folder: Where weights that wait on disk are put if the checkpoint's own files cannot serve; None is a
            temporary folder that goes with the session.
        adapters: LoRA adapters to load beside the model: folders or Hub ids. The last one is active.
    """

    model: ModelRef = field(default_factory=lambda: ModelRef(name="demo"))
    precision: Precision = field(default_factory=FullPrecision)
    strategy: str = "auto"
    max_memory: Mapping[DeviceId, int | str] | None = None
    device_map: Mapping[str, DeviceId] | None = None
    workload: Workload = field(default_factory=Workload)
    no_split_module_classes: Sequence[str] | None = None
    fallback_allocation: bool = False
    offload_buffers: bool = False
    offload_folder: str | None = None
    adapters: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Check the choices as far as they can be checked without the model and the machine.

        Raises:
            ValueError: If a choice cannot be meant; the sentence says what to do.
        """
        put = object.__setattr__
        put(self, "model", ModelRef.parse(self.model))
        if not isinstance(self.precision, tuple(PRECISIONS.values())):
            names = ", ".join(f"{cls.__name__}()" for cls in PRECISIONS.values())
            raise ValueError(f"precision is one of {names}, not {self.precision!r}.")  # noqa: TRY004 - one kind of error for bad input
        if not isinstance(self.workload, Workload):
            raise ValueError(f"workload is Workload(context_length=..., batch_size=...), not {self.workload!r}.")  # noqa: TRY004 - likewise
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy is one of {', '.join(map(repr, STRATEGIES))}, not {self.strategy!r}.")
        if self.max_memory is not None:
            if not isinstance(self.max_memory, Mapping) or not self.max_memory:
                raise ValueError('max_memory is a dict such as {0: "10GiB", "cpu": "20GiB"}, or None for what is free.')
            put(self, "max_memory", MappingProxyType(_read_budgets(self.max_memory)))
        if self.device_map is not None:
            if self.strategy != "custom":
                raise ValueError(f'A device_map needs strategy="custom"; with {self.strategy!r} it would be ignored.')
            if not isinstance(self.device_map, Mapping) or not self.device_map:
                raise ValueError('device_map is a dict such as {"model.layers.0": 0, "lm_head": "cpu"}.')
            put(self, "device_map", MappingProxyType({str(k): _device_key(v) for k, v in self.device_map.items()}))
        elif self.strategy == "custom":
            raise ValueError('strategy="custom" needs a device_map: module name to device.')
        self._check_knobs()

    def _check_knobs(self) -> None:
        classes = self.no_split_module_classes
        if classes is not None:
            if isinstance(classes, str) or not all(isinstance(name, str) and name for name in classes):
                raise ValueError(f'no_split_module_classes is a list such as ["LlamaDecoderLayer"], not {classes!r}.')
            object.__setattr__(self, "no_split_module_classes", tuple(classes))
        for name in ("fallback_allocation", "offload_buffers"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is True or False, not {getattr(self, name)!r}.")  # noqa: TRY004 - likewise
        folder = self.offload_folder
        if folder is not None and (not isinstance(folder, str) or not folder.strip()):
            raise ValueError(f"offload_folder is the path of a folder, not {folder!r}; leave it out.")
        adapters = self.adapters
        if isinstance(adapters, str) or not all(isinstance(name, str) and name.strip() for name in adapters):
            raise ValueError(f"adapters is a sequence of folders or Hub ids, not {adapters!r}.")
        object.__setattr__(self, "adapters", tuple(adapters))

    def with_(self, **changes: Any) -> Recipe:
        """A copy with some choices changed.

        Raises:
            TypeError: If a choice is unknown; the valid ones are listed.
            ValueError: If a choice cannot be meant.
        """
        current = {f.name: getattr(self, f.name) for f in fields(self)}
        return Recipe(**{**current, **changes})

    def to_json(self) -> str:
        """Versioned JSON, the same text for equal recipes, in whatever order their devices and modules were named."""
        devices = self.device_map
        return json.dumps(
            {
                "workbench_recipe": _VERSION,
                "model": {f.name: getattr(self.model, f.name) for f in fields(self.model)},
                "precision": precision_to_dict(self.precision),
                "strategy": self.strategy,
                "max_memory": None if self.max_memory is None else {str(k): v for k, v in self.max_memory.items()},
                "device_map": None if devices is None else {n: devices[n] for n in sorted(devices, key=_counted)},
                "workload": {f.name: getattr(self.workload, f.name) for f in fields(self.workload)},
                **{name: getattr(self, name) for name in _KNOBS},
            },
            indent=2,
        )

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """The inverse of :meth:`to_json`.

        What the text says of ``trust_remote_code`` and ``allow_pickle`` holds: a file from somebody else could so run
        their code here. Look at ``recipe.model`` before anything is done with it.

        Raises:
            ValueError: If the text is no recipe, or one of a later version.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"This is no recipe: it is no JSON (line {error.lineno}: {error.msg}).") from None
        if not isinstance(data, dict) or "workbench_recipe" not in data:
            raise ValueError('This JSON is no recipe: it has no "workbench_recipe" version.')
        version = data.pop("workbench_recipe")
        if version != _VERSION:
            raise ValueError(f"This recipe has version {version!r}, this Workbench reads {_VERSION}: update Workbench.")
        try:
            data["model"] = ModelRef(**data["model"])
            data["precision"] = precision_from_dict(data["precision"])
            data["workload"] = Workload(**data["workload"])
            return cls(**data)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"This recipe cannot be read: {error}") from None

    def to_python(self, placement: Placement | None = None, generation: GenerationOptions | None = None) -> str:
        """Plain transformers code that loads the same model in the same way, without Workbench.

        Args:
            placement: Write this placement's own device map; None writes the strategy and ``max_memory``, which the
                machine that runs the code then turns into a map (for ``"packed"``, the map for this machine).
            generation: How its answer is made; None is by the likeliest tokens.

        Returns:
            A Python program.
        """
        return _write_python(self, placement, generation or GenerationOptions())

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        """Pickle and deep-copy as plain choices: a mapping proxy can do neither."""
        choices: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("max_memory", "device_map"):
            choices[name] = choices[name] and dict(choices[name])
        return partial(Recipe, **choices), ()

    def __hash__(self) -> int:
        """Equal recipes hash alike."""
        return hash(self.to_json())


# --- the exported program ---------------------------------------------------------------------------------------------


def _write_python(recipe: Recipe, placement: Placement | None, generation: GenerationOptions) -> str:
    from workbench.placement import place
    from workbench.skeleton import read_skeleton

    skeleton = read_skeleton(recipe.model)
    # What transformers has no argument for.
    own = recipe.strategy == "packed" or recipe.no_split_module_classes is not None or recipe.fallback_allocation
    if placement is None and own and recipe.strategy != "custom":
        placement = place(recipe, skeleton=skeleton)
    source, ref, precision = skeleton.source, recipe.model, recipe.precision
    dtype = precision.dtype_of(skeleton.dtype)
    quantization = precision.to_python(dtype)
    device_map = recipe.device_map if placement is None else placement.device_map
    memory = None if recipe.max_memory is None else dict(recipe.max_memory)

    common = ["MODEL"]
    if ref.revision:
        common.append(f"revision={ref.revision!r}")
    if ref.trust_remote_code:
        common.append("trust_remote_code=True")
    if source.gguf_file is not None:
        common.append(f"gguf_file={source.gguf_file!r}")
    arguments = [*common, f"dtype=torch.{dtype}", "device_map=device_map"]
    if source.gguf_file is not None:
        arguments.append("quantization_config=GgufConfig(dequantize=True)")
    elif not ref.allow_pickle:
        arguments.append("use_safetensors=True")
    if device_map is None:
        map_lines = [f'device_map = "{recipe.strategy}"']
        if memory is not None:
            arguments.append(f"max_memory={memory!r}")
    else:
        asked = f'From strategy "{recipe.strategy}"' + ("" if memory is None else f" with max_memory={memory!r}")
        map_lines = [*([] if recipe.strategy == "custom" else [f"# {asked}."]), *_write_map(device_map)]
    if quantization:
        arguments.append("quantization_config=quantization_config")
    if "disk" in (memory or {} if device_map is None else device_map.values()):
        arguments.append(f"offload_folder={recipe.offload_folder or 'offload'!r}")
    if recipe.offload_buffers:
        arguments.append("offload_buffers=True")

    auto_class = "AutoModelForSeq2SeqLM" if skeleton.is_encoder_decoder else "AutoModelForCausalLM"
    config_class = ""
    if quantization:
        config_class = f", {precision.config_class}"
    elif source.gguf_file is not None:
        config_class = ", GgufConfig"
    packages = [PACKAGES.get(skeleton.quant_method or "", precision.package)]
    packages = [name for name in (*packages, "peft" if recipe.adapters else None) if name]
    # What a decoder alone returns begins with the prompt.
    answer = "" if skeleton.is_encoder_decoder else '[inputs["input_ids"].shape[1]:]'
    lines = [
        f"# {source.title}, {skeleton.quantized_as or precision.label}.",
        "# pip install torch transformers accelerate" + "".join(f" {name}" for name in packages),
        *(["import logging", ""] if precision.method == "int8" else []),
        "import torch",
        *(["from peft import PeftModel"] if recipe.adapters else []),
        *(precision.imports if quantization else ()),
        f"from transformers import {auto_class}, AutoTokenizer{config_class}",
        "",
        f"MODEL = {source.location!r}",
        "",
    ]
    if precision.method == "int8":
        lines += [
            "# bitsandbytes logs a line for every layer of every token when it casts to float16.",
            'logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)',
            "",
        ]
    lines += [
        *quantization,
        *map_lines,
        "",
        f"model = {auto_class}.from_pretrained(",
        *(f"    {argument}," for argument in arguments),
        ")",
        *_write_adapters(recipe),
        f"tokenizer = AutoTokenizer.from_pretrained({', '.join(common)})",
        "",
        'prompt = "What is the capital of France?"',
        "if tokenizer.chat_template:",
        '    prompt = [{"role": "user", "content": prompt}]',
        "    options = dict(add_generation_prompt=True, return_dict=True)",
        '    inputs = tokenizer.apply_chat_template(prompt, return_tensors="pt", **options)',
        "else:",
        '    inputs = tokenizer(prompt, return_tensors="pt")',
        f"inputs = inputs.to({_input_device(device_map, memory)})",
        *([] if generation.seed is None else [f"torch.manual_seed({generation.seed})"]),
        f"output = model.generate({', '.join(['**inputs', *_write_generation(recipe, generation)])})",
        f"print(tokenizer.decode(output[0]{answer}, skip_special_tokens=True))",
        "",
    ]
    return "\n".join(lines)


def _write_generation(recipe: Recipe, generation: GenerationOptions) -> list[str]:
    written = {name: repr(value) for name, value in CACHE_OPTIONS[recipe.workload.cache].items()}
    return [f"{name}={value}" for name, value in {**generation.to_python(), **written}.items()]


def _write_adapters(recipe: Recipe) -> list[str]:
    from workbench.adapters import read_adapters

    lines: list[str] = []
    for adapter in read_adapters(recipe.adapters):
        arguments = f"{adapter.location!r}, adapter_name={adapter.name!r}"
        if lines:
            lines += [f"model.load_adapter({arguments})", f"model.set_adapter({adapter.name!r})"]
        else:
            lines.append(f"model = PeftModel.from_pretrained(model, {arguments})")
    return lines


def _input_device(device_map: Mapping[str, DeviceId] | None, memory: Mapping[DeviceId, int | str] | None) -> str:
    """Where the prompt belongs, as an expression; ``model.device`` says "meta" when the embedding is offloaded."""
    if device_map is None and memory is None:
        return '"cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"'
    named = (memory or {}) if device_map is None else device_map.values()
    gpus = [device for device in named if device not in ("cpu", "disk")]
    return f'"{device_label(gpus[0]) if gpus else "cpu"}"'


def _write_map(device_map: Mapping[str, DeviceId]) -> list[str]:
    """A device map as Python, with runs of numbered layers on one device written as ranges."""
    lines = ["device_map = {"]
    items = list(device_map.items())
    at = 0
    while at < len(items):
        name, device = items[at]
        prefix, _, number = name.rpartition(".")
        end = at + 1
        if number.isdecimal():
            while end < len(items) and items[end] == (f"{prefix}.{int(number) + end - at}", device):
                end += 1
        if end - at > 2:
            first, last = int(number), int(number) + end - at
            lines.append(f'    **{{f"{prefix}.{{i}}": {device!r} for i in range({first}, {last})}},')
        else:
            end = at + 1
            lines.append(f"    {name!r}: {device!r},")
        at = end
    return [*lines, "}"]
