"""Which kernels can multiply with GPTQ weights here, and which of them do it right.

gptqmodel picks one by speed alone. Each is checked once here against the plain product with the dequantized weight,
built and initialized exactly as transformers does it, and one that is wrong is not used.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import math
import os
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.hardware import device_label

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from workbench.hardware import DeviceId
    from workbench.precision import GPTQ

_TOLERANCE = 0.02  # relative; a wrong kernel is off by 0.3 and more, the coarsest right one by 0.008
# What rounding to the model's own type costs, with room: a kernel that is further off computes in a coarser one.
_ROUNDING = {"bfloat16": 0.004, "float16": 0.001, "float32": 0.001}
_LIBRARY_NAMES = {name: f"gptq_{name}" for name in ("torch", "torch_fused", "torch_aten", "torch_int8", "triton")} | {
    name: f"gptq_{name}" for name in ("exllama_v2", "marlin", "machete", "bitblas")
}
_WHOLE_ON_GPU = ("exllama_v2", "marlin", "machete", "bitblas")
# What importing gptqmodel sets for its own ends, and what would send this process's children to another cache.
_NOT_THEIRS = ("HF_HOME", "HF_HUB_CACHE", "TRANSFORMERS_CACHE", "HF_MODULES_CACHE")


@functools.lru_cache(maxsize=1)
def import_gptqmodel() -> Any:
    """Import gptqmodel without its banner, and without the environment variables that it sets for everybody.

    Returns:
        The module.

    Raises:
        ValueError: If it is not installed.
    """
    import importlib.util

    for package in ("gptqmodel", "optimum"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"GPTQ needs {package}: run `pip install 'llm-device-workbench[gptq]'`, then restart.")
    before = {name: os.environ.get(name) for name in _NOT_THEIRS}
    # Newer versions want two workers more than a machine with two cores has.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    logging.getLogger("torchao").setLevel(logging.ERROR)
    with quietly(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        import gptqmodel
        import optimum.gptq  # noqa: F401 - what transformers loads with
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    from gptqmodel.utils.logger import setup_logger

    setup_logger().setLevel(logging.ERROR)
    return gptqmodel


@contextlib.contextmanager
def quiet_optimum() -> Iterator[None]:
    """Hold back warnings that optimum and gptqmodel set off, such as by touching every attribute of a model."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning)
        # gptqmodel leaves a folder for things that it does not offload here.
        warnings.filterwarnings("ignore", message="Implicitly cleaning up", category=ResourceWarning)
        yield


@contextlib.contextmanager
def spared_from_initialization(model_class: Any) -> Iterator[None]:
    """Keep a model class (GPT-2's, for one) from initializing the weights of quantized modules, which have none.

    Args:
        model_class: A ``transformers`` class, about to be loaded.
    """
    owner = next(cls for cls in model_class.__mro__ if "_init_weights" in vars(cls))  # the models inside inherit it too
    original = vars(owner)["_init_weights"]

    def initialize(model: Any, module: Any) -> None:
        if not any(hasattr(child, "qweight") for child in (module, *module.children())):
            original(model, module)

    owner._init_weights = initialize  # noqa: SLF001 - transformers' own hook for it
    try:
        yield
    finally:
        owner._init_weights = original  # noqa: SLF001 - likewise


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Hold back what libraries log and warn of."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One choice of ``GPTQ.backend`` on a machine.

    Attributes:
        name: As ``GPTQ(backend=...)`` takes it.
        kernel: The class that multiplies, e.g. ``"TorchAtenLinear"``; None for ``"auto"`` and where there is none.
        usable: Whether it can be chosen here.
        reason: Why not, or what it is, as a sentence.
        error: How far it was from the plain product, relatively; None where it was not tried.
        coarse: Whether it computes in a coarser type than the model, so that ``"auto"`` passes it over.
    """

    name: str
    kernel: str | None
    usable: bool
    reason: str
    error: float | None = None
    coarse: bool = False


def backends(
    precision: GPTQ,
    shapes: Iterable[tuple[int, int]] = (),
    *,
    devices: Iterable[DeviceId] = ("cpu",),
    dtype: str = "float16",
    adapters: bool = False,
    check: bool = True,
) -> tuple[Backend, ...]:
    """Say of every backend whether this machine can use it for these weights, and why not.

    Args:
        precision: Bits, group size and the like; its own ``backend`` does not matter.
        shapes: (out, in) of the quantized modules, each once.
        devices: The devices of the device map.
        dtype: What the model computes in.
        adapters: Whether adapters are put on it.
        check: Compare the usable ones with the plain product; a shape takes some milliseconds.

    Returns:
        One entry for each choice, ``"auto"`` first and the others from fast to slow as gptqmodel ranks them.
    """
    shapes, devices = tuple(dict.fromkeys(shapes)), tuple(dict.fromkeys(devices))
    found = tuple(_tried(precision, shapes, devices, dtype, adapters=adapters, check=check))
    first = next((b for b in found if b.usable and not b.coarse), None)
    auto = Backend(
        name="auto",
        kernel=None if first is None else first.kernel,
        usable=first is not None,
        reason="No kernel here is right." if first is None else f"The fastest that is right here: {first.name}.",
        error=None if first is None else first.error,
    )
    return (auto, *found)


def _tried(
    precision: GPTQ,
    shapes: tuple[tuple[int, int], ...],
    devices: tuple[DeviceId, ...],
    dtype: str,
    *,
    adapters: bool,
    check: bool = True,
    only: str = "auto",
) -> Iterator[Backend]:
    """Try the backends from fast to slow, or only one."""
    from workbench.precision import GPTQ_BACKENDS

    import_gptqmodel()
    for name in sorted((n for n in GPTQ_BACKENDS if n != "auto" and only in (n, "auto")), key=_rank):
        kernel, reason = _candidate(name, precision, shapes, devices, adapters=adapters)
        error, usable = None, kernel is not None
        if kernel is not None and check and shapes:
            found = _tested(kernel, precision, shapes, dtype, _run_device(devices))
            if isinstance(found, str):
                usable, reason = False, f"{kernel.__name__} cannot run here: {found}"
            else:
                error = found
            if error is not None and error > _TOLERANCE:
                usable = False
                off = "no number comes out" if math.isinf(error) else f"{error:.1%} from the plain product"
                reason = f"{kernel.__name__} multiplies WRONG here: {off} with {_describe(precision)}."
        coarse = error is not None and _ROUNDING.get(dtype, 0.001) < error <= _TOLERANCE
        if kernel is not None and coarse:
            reason = (
                f"{kernel.__name__} computes more coarsely than {dtype}, {error:.2%} from the plain product: only "
                f"with backend={name!r}."
            )
        yield Backend(
            name=name,
            kernel=None if kernel is None else kernel.__name__,
            usable=usable,
            reason=reason,
            error=error,
            coarse=coarse,
        )


def choose_backend(
    precision: GPTQ,
    shapes: Iterable[tuple[int, int]],
    *,
    devices: Iterable[DeviceId],
    dtype: str,
    adapters: bool = False,
) -> tuple[str, tuple[str, ...]]:
    """Pick the kernel to load with.

    Args:
        precision: Its ``backend`` is what was asked for.
        shapes: (out, in) of the quantized modules.
        devices: The devices of the device map.
        dtype: What the model computes in.
        adapters: Whether adapters are put on it.

    Returns:
        gptqmodel's name of it, and sentences about the choice: which kernel it is, and which were wrong.

    Raises:
        ValueError: If the one that was asked for cannot be used here, or none can.
    """
    tried: list[Backend] = []
    chosen = None
    shapes, devices = tuple(dict.fromkeys(shapes)), tuple(dict.fromkeys(devices))
    for backend in _tried(precision, shapes, devices, dtype, adapters=adapters, only=precision.backend):
        tried.append(backend)
        if precision.backend != "auto" or (backend.usable and not backend.coarse):
            chosen = backend
            break
    if chosen is None or not chosen.usable:
        reason = "no kernel here is right." if chosen is None else chosen.reason
        raise ValueError(f"backend={precision.backend!r} cannot be used: {reason} Take backend='auto' or 'torch'.")
    passed = (b for b in tried if b is not chosen and b.kernel is not None)
    wrong = tuple(b.reason if b.coarse else b.reason + " It is not used." for b in passed)
    error = "" if chosen.error is None else f", {chosen.error:.2%} from the plain product"
    return _LIBRARY_NAMES[chosen.name], (f"Kernel: {chosen.kernel} ({chosen.name}){error}.", *wrong)


def settle_kernels(model: Any) -> None:
    """Undo what gptqmodel's plain kernel does to itself: a compilation for each module.

    torch gives up after eight of them, having taken a second for each, and says so at length.

    Args:
        model: With quantized modules, just loaded.
    """
    for module in model.modules():
        if hasattr(module, "qweight"):
            vars(module).pop("dequantize_weight", None)


def library_backend(name: str) -> str:
    """What gptqmodel calls one of our choices."""
    return _LIBRARY_NAMES.get(name, name)


def _describe(precision: GPTQ) -> str:
    return ", ".join(
        (
            f"{precision.bits} bits",
            "whole rows" if precision.group_size == -1 else f"groups of {precision.group_size}",
            "symmetric" if precision.sym else "asymmetric",
            *(("act-order",) if precision.desc_act else ()),
        )
    )


def _rank(name: str) -> int:
    from gptqmodel.quantization import FORMAT, METHOD
    from gptqmodel.utils.importer import AUTO_BACKEND_KERNEL_MAPPING

    order = [backend.value for backend in AUTO_BACKEND_KERNEL_MAPPING[METHOD.GPTQ][FORMAT.GPTQ]]
    return order.index(library_backend(name)) if library_backend(name) in order else len(order)


def _run_device(devices: tuple[DeviceId, ...]) -> str:
    gpus = [device for device in devices if device not in ("cpu", "disk")]
    if not gpus:
        return "cpu"
    return device_label(gpus[0])


def _candidate(
    name: str,
    precision: GPTQ,
    shapes: tuple[tuple[int, int], ...],
    devices: tuple[DeviceId, ...],
    *,
    adapters: bool,
) -> tuple[Any | None, str]:
    """The kernel behind a name, or None, and a sentence about it."""
    import torch
    from gptqmodel.quantization import FORMAT, METHOD
    from gptqmodel.utils.backend import BACKEND
    from gptqmodel.utils.importer import get_kernel_for_backend

    if name == "exllama_v1":
        return None, "gptqmodel has no ExLlama v1 any more; exllama_v2 and marlin have taken its place."
    run_on = _run_device(devices)
    if name in _WHOLE_ON_GPU and run_on != "cpu" and set(devices) & {"cpu", "disk"}:
        return None, f"{name} needs the whole model on GPUs; some of it is on the CPU or the disk."
    try:
        kernel = get_kernel_for_backend(BACKEND(library_backend(name)), METHOD.GPTQ, FORMAT(precision.format))
    except ValueError as error:
        return None, _sentence(error)
    if adapters and not kernel.SUPPORTS_TRAINING:
        return None, f"{name} is switched off for adapters: {kernel.__name__} passes no gradients on."
    families = {str(getattr(device, "value", device)) for device in kernel.SUPPORTS_DEVICES}
    family = torch.device(run_on).type
    if "all" not in families and family not in families:
        return (
            None,
            f"{name} runs on {' or '.join(sorted(families)).upper()} only, and this model runs on the {family}.",
        )
    for rows, columns in shapes or ((None, None),):
        usable, why_not = kernel.validate(
            bits=precision.bits,
            group_size=precision.group_size,
            desc_act=precision.desc_act,
            sym=precision.sym,
            in_features=columns,
            out_features=rows,
            pack_dtype=torch.int32,
            device=torch.device(run_on),
        )
        if not usable:
            return None, _sentence(why_not)
    return kernel, f"{kernel.__name__} by gptqmodel."


def _sentence(error: Any) -> str:
    text = " ".join(str(error).split()).replace("<class '", "").replace("'>", "")
    text = text.replace("gptqmodel.nn_modules.qlinear.", "")
    return text[:200].rstrip(".") + "."


def _tested(kernel: Any, precision: GPTQ, shapes: tuple[tuple[int, int], ...], dtype: str, device: str) -> float | str:
    """As :func:`_relative_error`, also where memory ran out: the next time there may be more."""
    try:
        return _relative_error(kernel, precision, shapes, dtype, device)
    except Exception as error:  # noqa: BLE001 - likewise
        return _sentence(error)


@functools.lru_cache(maxsize=512)
def _relative_error(
    kernel: Any, precision: GPTQ, shapes: tuple[tuple[int, int], ...], dtype: str, device: str
) -> float | str:
    """How far a kernel's product is from the plain one at worst, for weights of these shapes with random content.

    Where it cannot run, why not.

    It is built with the same positional arguments, converted and initialized by the same functions as when
    transformers loads a model: what goes wrong there goes wrong here.
    """
    import torch
    from gptqmodel.utils.model import hf_convert_gptq_v1_to_v2_format, hf_gptqmodel_post_init

    from workbench.gptq_packing import dequantize
    from workbench.load_guard import is_out_of_memory

    worst = 0.0
    try:
        with quietly(), torch.inference_mode():
            holder = torch.nn.Module()
            plain = {}
            for rows, columns in shapes:
                name = f"linear_{rows}_{columns}"
                linear = kernel(
                    precision.bits,
                    precision.group_size,
                    precision.desc_act,
                    precision.sym,
                    columns,
                    rows,
                    False,
                    weight_dtype=getattr(torch, dtype),
                )
                packed = _random_weight(precision, rows, columns)
                plain[name] = dequantize(packed, bits=precision.bits, layout=precision.format).to(device)
                for part, tensor in packed.tensors("").items():
                    getattr(linear, part.removeprefix(".")).copy_(tensor)
                holder.add_module(name, linear)
            holder.to(device).eval()
            holder, _ = hf_convert_gptq_v1_to_v2_format(holder, precision.bits, kernel, precision.format, None)
            holder = hf_gptqmodel_post_init(holder, use_act_order=precision.desc_act)
            settle_kernels(holder)
            generator = torch.Generator().manual_seed(1)
            for name, weight in plain.items():
                for tokens in (1, 33):  # some have a path of their own for single tokens
                    x = torch.randn(tokens, weight.shape[1], generator=generator)
                    x = x.to(device=device, dtype=getattr(torch, dtype))
                    want = x.float() @ weight.t()
                    got = holder.get_submodule(name)(x).float()
                    worst = max(worst, float(((got - want).norm() / want.norm()).nan_to_num(float("inf"))))
    except Exception as error:  # compiled code from several projects; a kernel that fails is one not to use
        if is_out_of_memory(error):
            raise
        return _sentence(error)
    return worst


def _random_weight(precision: GPTQ, rows: int, columns: int) -> Any:
    import torch

    from workbench.gptq_packing import PackedLinear, pack_values

    generator = torch.Generator().manual_seed(0)
    group_size = columns if precision.group_size == -1 else precision.group_size
    groups = -(-columns // group_size)
    top, middle = 2**precision.bits, 2 ** (precision.bits - 1)
    g_idx = torch.arange(columns) // group_size
    if precision.desc_act:
        g_idx = g_idx[torch.randperm(columns, generator=generator)]
    lift = 1 if precision.format == "gptq" else 0
    if precision.sym:
        zeros = torch.full((groups, rows), middle)
    else:
        zeros = torch.randint(lift, top, (groups, rows), generator=generator)
    return PackedLinear(
        qweight=pack_values(torch.randint(0, top, (columns, rows), generator=generator), precision.bits),
        qzeros=pack_values((zeros - lift).t(), precision.bits).t().contiguous(),
        scales=(torch.rand(groups, rows, generator=generator) * 0.01 + 0.001).half(),
        g_idx=g_idx.int(),
    )
