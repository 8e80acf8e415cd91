"""Devices with memory: the machine at hand, or a hypothetical one by preset."""

from __future__ import annotations

import difflib
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from workbench.model import refuses_unknown

DeviceId = int | str

_KIB, _MIB, _GIB, _TIB = 2**10, 2**20, 2**30, 2**40
_UNITS = {"kib": _KIB, "mib": _MIB, "gib": _GIB, "tib": _TIB, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
# Twenty digits are more than any memory has; without a bound a long enough number would overflow a float.
_SIZE = re.compile(r"\s*(\d{1,20}(?:\.\d{0,20})?|\.\d{1,20})\s*([a-z]*)\s*", re.IGNORECASE)
_HOW_TO_WRITE = 'write bytes as a whole number, or a string such as "20GiB", "10GB" or "512MB"'

# Which non-GPU devices there are, in accelerate's order; GPUs come before them, ascending.
_NAMED_DEVICES = ("mps", "cpu", "disk")
THIS_MACHINE = "This machine"  # the name of what is detected

# With kernels loaded as they are first used (CUDA >= 11.7), PyTorch's maintainers put a process's context at 300 to
# 400 MB; the cuBLAS workspace comes on top.
_CUDA_CONTEXT_BYTES = 500 * _MIB
# Reading a GPU's free memory already makes its context, so what is still to come are the kernels and the workspace.
_CUDA_KERNELS_BYTES = 200 * _MIB


def parse_bytes(size: int | str) -> int:
    """Read a size of memory as accelerate and AutoGPTQ spell it.

    Args:
        size: Bytes as an int, or a string: digits alone are bytes; KiB, MiB, GiB, TiB are powers of 1024 and KB, MB,
            GB, TB powers of 1000. Case does not matter except for a final lower-case "b" of the latter (see Raises).

    Returns:
        The size in bytes, a fraction of a byte cut off as accelerate does.

    Raises:
        ValueError: If it is no size, is negative, or ends like "10Gb", which accelerate reads as bits.
    """
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        raise ValueError(f"{size!r} is no size of memory: {_HOW_TO_WRITE}.")  # noqa: TRY004 - bad input, one kind of error
    if (size < 0) if isinstance(size, int) else size.strip().startswith("-"):
        raise ValueError(f"A size of memory cannot be negative ({size!r}): {_HOW_TO_WRITE}.")
    if isinstance(size, int):
        return size
    match = _SIZE.fullmatch(size)
    number, unit = match.groups() if match else ("", "?")
    if not unit and number.isdecimal():
        return int(number)
    factor = _UNITS.get(unit.lower())
    if factor is None:
        raise ValueError(f"{size!r} is no size of memory: {_HOW_TO_WRITE}.")
    if unit.endswith("b") and not unit.lower().endswith("ib"):
        raise ValueError(f'{size!r} would mean bits to accelerate: write "{number}{unit.upper()}" for bytes.')
    return int(float(number) * factor)


def format_bytes(n: int) -> str:
    """Spell a number of bytes for people.

    Args:
        n: Bytes; may be negative (a difference).

    Returns:
        GiB with one decimal, such as "13.5 GiB"; whole MiB under 1 GiB, whole KiB (rounded up) under 1 MiB.
    """
    if n < 0:
        return f"-{format_bytes(-n)}"
    if n == 0:
        return "0 GiB"
    if round(n / _MIB) >= 1024:
        return f"{n / _GIB:.1f} GiB"
    kib = -(-n // _KIB)  # rounded up, so that nothing is shown as "0 KiB"
    return f"{n / _MIB:.0f} MiB" if kib >= 1024 else f"{kib} KiB"


@refuses_unknown
@dataclass(frozen=True, kw_only=True)
class Device:
    """A thing with memory: a GPU, the RAM, a disk.

    Args:
        id: As ``max_memory`` spells it: 0, 1, ... for CUDA GPUs, "mps", "cpu" or "disk".
        name: What it is called, such as "NVIDIA GeForce RTX 4090", "RAM" or "Disk".
        total_bytes: All its memory (in a container: what the container may use).
        free_bytes: What is free now; on a hypothetical machine everything.
        reserved_bytes: What the default budget leaves alone.
        reserved_for: In words, what that is for.
        bandwidth_bytes_per_s: Memory bandwidth, on a disk sequential reading; None if unknown.
        source: In words, where the figures come from.

    Raises:
        ValueError: If the id is none of those, or a size is negative or more than the total.
    """

    id: int | str
    name: str
    total_bytes: int
    free_bytes: int
    reserved_bytes: int
    reserved_for: str
    bandwidth_bytes_per_s: int | None
    source: str

    def __post_init__(self) -> None:
        """Check the id and the sizes."""
        if not (type(self.id) is int and self.id >= 0) and self.id not in _NAMED_DEVICES:
            raise ValueError(f'{self.id!r} is no device id: use 0, 1, ... for a GPU, or "mps", "cpu" or "disk".')
        for field in ("total_bytes", "free_bytes", "reserved_bytes"):
            size = getattr(self, field)
            if type(size) is not int or size < 0:
                raise ValueError(f"{field} of {self.label} must be a whole number, zero or more, not {size!r}.")
        if self.free_bytes > self.total_bytes:
            raise ValueError(
                f"free_bytes of {self.label} ({self.free_bytes}) must not exceed its total_bytes ({self.total_bytes})."
            )

    @property
    def label(self) -> str:
        """The device as torch and people write it: "cuda:0", "mps", "cpu", "disk"."""
        return device_label(self.id)

    @property
    def budget_bytes(self) -> int:
        """What a model may take by default: free memory less the reserve, never below zero."""
        return max(0, self.free_bytes - self.reserved_bytes)


@refuses_unknown
@dataclass(frozen=True, kw_only=True)
class Machine:
    """A set of devices: this machine, a preset, or one put together by hand.

    Args:
        name: What it is called; "This machine" for the one that was detected.
        devices: Its devices, in any order; kept in accelerate's (GPUs ascending, "mps", "cpu", "disk").

    Raises:
        ValueError: If two devices have the same id, or there is no "cpu".
    """

    name: str = "custom"
    devices: tuple[Device, ...]

    def __post_init__(self) -> None:
        """Put the devices in order and check them."""
        devices = tuple(sorted(self.devices, key=lambda device: _rank(device.id)))
        ids = [device.id for device in devices]
        twice = next((device.label for device in devices if ids.count(device.id) > 1), None)
        if twice:
            raise ValueError(f"A machine has each device once, but {twice} was given twice.")
        if "cpu" not in ids:
            raise ValueError('A machine needs a device with the id "cpu" for its RAM: add one.')
        object.__setattr__(self, "devices", devices)

    @property
    def is_here(self) -> bool:
        """Whether it is the one that this runs on, as :meth:`detect` finds it."""
        return self.name == THIS_MACHINE

    @classmethod
    @refuses_unknown
    def detect(cls, *, offload_folder: str | os.PathLike[str] | None = None, accelerators: bool = True) -> Machine:
        """Look at the machine at hand: its GPUs, its RAM and the disk for offloaded layers, as they are now.

        RAM is what this process may use: a container's limit (cgroup v1 or v2) counts as the total. Without torch, or
        without a GPU that it supports, the machine is "cpu" and "disk". Asking a GPU for its free memory makes CUDA's
        context on it.

        Args:
            offload_folder: Where layers on "disk" would go; it need not exist yet. Default: the user's cache folder.
            accelerators: False leaves the GPUs out, which spares the import of torch.

        Raises:
            ValueError: If ``offload_folder`` is a file.
        """
        ram, disk = _detect_ram(Path("/")), _detect_disk(offload_folder)
        gpus, shared_bytes = _detect_accelerators(ram) if accelerators else ([], 0)
        if shared_bytes:
            # What a GPU without memory of its own may fill, the RAM must not offer once more.
            ram = replace(
                ram,
                reserved_bytes=ram.reserved_bytes + shared_bytes,
                reserved_for=f"{ram.reserved_for}, and the GPU, which shares this memory",
            )
        return cls(name=THIS_MACHINE, devices=(*gpus, ram, disk))

    @classmethod
    def preset(cls, name: str) -> Machine:
        """Make a well-known machine, all its memory free.

        Args:
            name: One of ``Machine.presets()``.

        Returns:
            The machine; each device says in ``source`` which figures are specified and which typical.

        Raises:
            ValueError: If there is no such preset; the sentence lists them, the closest first.
        """
        build = _PRESETS.get(name)
        if build is None:
            lower = {preset.lower(): preset for preset in _PRESETS}
            close = difflib.get_close_matches(str(name).lower(), lower, n=1)
            hint = f" (did you mean {lower[close[0]]!r}?)" if close else ""
            raise ValueError(f"There is no machine preset {name!r}{hint}: choose one of {', '.join(_PRESETS)}.")
        card, count, around = build
        gpus = () if card is None else (_gpu(card, index) for index in range(count))
        return cls(name=name, devices=(*gpus, *around))

    @staticmethod
    def presets() -> tuple[str, ...]:
        """The names that ``preset`` knows."""
        return tuple(_PRESETS)

    @property
    def accelerators(self) -> tuple[Device, ...]:
        """The GPUs, or Apple's "mps"."""
        return tuple(device for device in self.devices if device.id not in ("cpu", "disk"))

    def device(self, id: int | str) -> Device:  # noqa: A002 - named as the field is
        """Find a device.

        Args:
            id: As ``max_memory`` spells it; "0" and "cuda:0" also mean 0.

        Raises:
            ValueError: If the machine has none such (the sentence lists what it has), or this is no id at all.
        """
        wanted = _read_id(id)
        for device in self.devices:
            if device.id == wanted:
                return device
        labels = [device.label for device in self.devices]
        has = f"{', '.join(labels[:-1])} and {labels[-1]}" if labels[1:] else labels[0]
        who = "This machine" if self.name in ("custom", THIS_MACHINE) else f"The machine {self.name!r}"
        raise ValueError(f"{who} has no {device_label(wanted)}: it has {has}.")

    def budgets(self) -> dict[int | str, int]:
        """The default ``max_memory``, in bytes: every GPU and the RAM, less each one's reserve.

        "disk" is not among them: it is used only when it is asked for.
        """
        return {device.id: device.budget_bytes for device in self.devices if device.id != "disk"}

    def parse_max_memory(self, max_memory: Mapping[int | str, int | str] | None) -> dict[int | str, int]:
        """Check a budget per device against this machine.

        Args:
            max_memory: Device to size, as accelerate and AutoGPTQ spell both (``{0: "20GiB", "cpu": "30GiB"}``; "0" and
                "cuda:0" also mean 0). A device that is left out is not used. None means ``budgets()``.

        Returns:
            Device to bytes, in accelerate's order: GPUs ascending, "mps", "cpu", "disk".

        Raises:
            ValueError: If a device is not in this machine or named twice, a key is no device, a size is none or
                negative, or nothing at all is given.
        """
        if max_memory is None:
            return self.budgets()
        if not isinstance(max_memory, Mapping) or not max_memory:
            raise ValueError('max_memory must give at least one device a size, as in {0: "20GiB", "cpu": "30GiB"}.')
        budgets: dict[int | str, int] = {}
        for key, size in max_memory.items():
            device = self.device(key)
            if device.id in budgets:
                raise ValueError(f"max_memory names {device.label} twice: keep one of the two.")
            try:
                budgets[device.id] = parse_bytes(size)
            except ValueError as error:
                raise ValueError(f"max_memory for {device.label}: {error}") from None
        return dict(sorted(budgets.items(), key=lambda item: _rank(item[0])))


def device_label(device: int | str) -> str:
    """The device as torch and people write it: "cuda:0", "mps", "cpu", "disk"."""
    return f"cuda:{device}" if isinstance(device, int) else device


def _rank(device: int | str) -> tuple[int, int]:
    """Where a device stands in accelerate's order."""
    return (0, device) if isinstance(device, int) else (1 + _NAMED_DEVICES.index(device), 0)


def _read_id(key: object) -> int | str:
    """Read a device as people write it; the result need not exist in any machine."""
    if isinstance(key, int) and not isinstance(key, bool):
        return key
    if isinstance(key, str):
        index = key.removeprefix("cuda:")
        return int(index) if re.fullmatch(r"[0-9]{1,4}", index) else key
    raise ValueError(f'{key!r} is no device: use 0, 1, ... for a GPU, or "mps", "cpu" or "disk".')


def _ram_headroom_bytes(total_bytes: int) -> int:
    """What stays free in RAM, whatever the model.

    The notebook, the browser tab and the next `pip install` need room to breathe, and a machine driven to the last page
    swaps or kills the kernel: a tenth. Past 20 GiB a tenth would be more than they ever take; and of the 2 GiB that
    Binder gives, more than 0.2 could not be spared.
    """
    return min(max(total_bytes // 10, _GIB // 5), 2 * _GIB)


def _disk_headroom_bytes(total_bytes: int) -> int:
    """What stays free on a disk: a full one breaks other programs, and 5 % is what file systems keep themselves."""
    return min(total_bytes // 20, 5 * _GIB)


def _cuda_slack_bytes(total_bytes: int) -> int:
    """What PyTorch's caching allocator loses to rounding and fragments: an estimate, 2 % within 256 MiB and 1 GiB."""
    return min(max(total_bytes // 50, 256 * _MIB), _GIB)


def _detect_ram(root: Path) -> Device:
    import psutil

    memory = psutil.virtual_memory()
    total_bytes, free_bytes, source = int(memory.total), int(memory.available), "measured by psutil"
    limits = _cgroup_memory(root)
    if limits is not None and limits[0] < total_bytes:
        total_bytes, free_bytes = limits[0], min(free_bytes, limits[1])
        source = "the memory limit of this container or session (cgroup), and psutil"
    return Device(
        id="cpu",
        name="RAM",
        total_bytes=total_bytes,
        free_bytes=min(free_bytes, total_bytes),
        reserved_bytes=_ram_headroom_bytes(total_bytes),
        reserved_for="operating system and notebook",
        bandwidth_bytes_per_s=None,
        source=source,
    )


def _cgroup_memory(root: Path) -> tuple[int, int] | None:
    """Read this process's memory limits from the kernel's files.

    Args:
        root: The file system's root (another one in tests).

    Returns:
        The smallest limit of this process's cgroup and those around it, and the least that any of them leaves free,
        both in bytes; None where there is no limit. cgroup v1's "no limit" is a number past all memory: the caller
        compares.
    """
    groups: dict[str, str] = {}  # controller -> this process's group; "" is the one tree of cgroup v2
    for line in _read_text(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        groups.update(dict.fromkeys(controllers.split(","), group))

    limits: list[int] = []
    frees: list[int] = []
    for line in _read_text(root / "proc/self/mountinfo").splitlines():
        mount, _, filesystem = line.partition(" - ")
        kind, *_, options = filesystem.split()
        if kind == "cgroup2" and "" in groups:
            group, limit_file, usage_file, prefix = groups[""], "memory.max", "memory.current", ""
        elif kind == "cgroup" and "memory" in options.split(",") and "memory" in groups:
            group, limit_file, usage_file = groups["memory"], "memory.limit_in_bytes", "memory.usage_in_bytes"
            prefix = "total_"  # v1 counts the group alone without it, v2 always the whole subtree
        else:
            continue
        mounted, mount_point = mount.split()[3:5]
        # A container sees its own group at the mount point while /proc may still name it as the host does.
        inner = PurePosixPath(group)
        inner = inner.relative_to(mounted) if inner.is_relative_to(mounted) else PurePosixPath()
        if ".." in inner.parts:
            inner = PurePosixPath()
        for level in (inner, *inner.parents):
            folder = root / mount_point.lstrip("/") / level
            stat = dict(line.split(maxsplit=1) for line in _read_text(folder / "memory.stat").splitlines())
            # v1 alone reports the limits of ancestors that the container cannot see.
            spelled = (_read_text(folder / limit_file).strip(), stat.get("hierarchical_memory_limit", ""))
            known = [int(limit) for limit in spelled if limit.isdecimal()]
            if not known:
                continue  # "max", or a group without the memory controller
            # File pages are given back on demand: they are not in the way of a model.
            cache_bytes = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
            used_bytes = max(0, int(_read_text(folder / usage_file).strip() or 0) - cache_bytes)
            limits.append(min(known))
            frees.append(max(0, min(known) - used_bytes))
    return (min(limits), min(frees)) if limits else None


def _read_text(path: Path) -> str:
    """A file's text, "" where there is none (another kernel, another system)."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _detect_disk(offload_folder: str | os.PathLike[str] | None) -> Device:
    if offload_folder is None:
        import platformdirs

        offload_folder = platformdirs.user_cache_dir("llm-device-workbench")
    folder = Path(offload_folder).expanduser().absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"offload_folder needs a folder, but {os.fspath(existing)!r} is a file: name another one.")
    usage = shutil.disk_usage(existing)
    return Device(
        id="disk",
        name="Disk",
        total_bytes=usage.total,
        free_bytes=min(usage.free, usage.total),
        reserved_bytes=_disk_headroom_bytes(usage.total),
        reserved_for="other programs",
        bandwidth_bytes_per_s=None,
        source=f"measured by shutil.disk_usage where {os.fspath(folder)!r} would be",
    )


def _detect_accelerators(ram: Device) -> tuple[list[Device], int]:
    """Ask torch for its GPUs.

    Returns:
        The devices, and how many bytes of RAM they count as theirs (GPUs that have no memory of their own).
    """
    try:
        import torch
    except (ImportError, OSError):  # not installed, or a library that it needs is missing
        return [], 0
    if torch.backends.mps.is_available():
        # Metal advises a share of the RAM; what RAM has not free, it has not either.
        total_bytes = min(torch.mps.recommended_max_memory(), ram.total_bytes)
        free_bytes = max(0, min(total_bytes - torch.mps.driver_allocated_memory(), ram.budget_bytes))
        mps = Device(
            id="mps",
            name="Apple GPU",
            total_bytes=total_bytes,
            free_bytes=free_bytes,
            reserved_bytes=min(free_bytes, _cuda_slack_bytes(total_bytes)),
            reserved_for="allocator slack",
            bandwidth_bytes_per_s=None,
            source="measured by torch.mps and psutil; shared with the RAM",
        )
        return [mps], free_bytes
    if not torch.cuda.is_available():
        return [], 0
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        kernels_bytes, reserved_for = 0, "allocator slack"
    else:
        kernels_bytes, reserved_for = _CUDA_KERNELS_BYTES, "CUDA kernels still to be loaded, allocator slack"
    gpus, shared_bytes = [], 0
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free_bytes, total_bytes = torch.cuda.mem_get_info(index)
        # What torch's cache holds without a tensor in it, the next model gets.
        free_bytes += torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
        if getattr(properties, "is_integrated", False):
            free_bytes = min(free_bytes, ram.budget_bytes)
            shared_bytes += free_bytes
        gpus.append(
            Device(
                id=index,
                name=properties.name,
                total_bytes=total_bytes,
                free_bytes=min(free_bytes, total_bytes),
                reserved_bytes=_cuda_slack_bytes(total_bytes) + kernels_bytes,
                reserved_for=reserved_for,
                bandwidth_bytes_per_s=_cuda_bandwidth(properties),
                source="measured by torch.cuda.mem_get_info",
            )
        )
    return gpus, shared_bytes


def _cuda_bandwidth(properties: object) -> int | None:
    """A GPU's memory bandwidth in bytes per second, from its clock and bus where torch tells, else by its name."""
    clock_khz, bus_bits = (getattr(properties, key, 0) for key in ("memory_clock_rate", "memory_bus_width"))
    if clock_khz and bus_bits:
        return int(2 * clock_khz * 1000 * bus_bits // 8)  # twice: double data rate
    name = getattr(properties, "name", "")
    return next((card.bandwidth_bytes_per_s for card in _CARDS if card.name == name), None)


class _Card(NamedTuple):
    """A GPU model."""

    name: str  # as torch reports it
    total_bytes: int  # what CUDA reports, the lowest that is commonly seen: drivers differ by up to 2 %
    bandwidth_bytes_per_s: int
    sheet: str


def _gpu(card: _Card, index: int) -> Device:
    return Device(
        id=index,
        name=card.name,
        total_bytes=card.total_bytes,
        free_bytes=card.total_bytes,
        reserved_bytes=_CUDA_CONTEXT_BYTES + _cuda_slack_bytes(card.total_bytes),
        reserved_for="CUDA context and allocator slack (estimate)",
        bandwidth_bytes_per_s=card.bandwidth_bytes_per_s,
        source=f"memory as CUDA typically reports it (drivers differ by up to 2 %); bandwidth: {card.sheet}",
    )


def _ram(gib: float, *, used_gib: float, gb_per_s: float, source: str) -> Device:
    total_bytes = int(gib * _GIB)
    return Device(
        id="cpu",
        name="RAM",
        total_bytes=total_bytes,
        free_bytes=total_bytes,
        reserved_bytes=int(used_gib * _GIB) + _ram_headroom_bytes(total_bytes),
        reserved_for="operating system and notebook (typical)",
        bandwidth_bytes_per_s=int(gb_per_s * 1e9),
        source=source,
    )


def _disk(gb: float, *, used_gb: float, gb_per_s: float, source: str) -> Device:
    total_bytes = int(gb * 1e9)
    return Device(
        id="disk",
        name="Disk",
        total_bytes=total_bytes,
        free_bytes=total_bytes,
        reserved_bytes=int(used_gb * 1e9) + _disk_headroom_bytes(total_bytes),
        reserved_for="what is installed, and other programs (typical)",
        bandwidth_bytes_per_s=int(gb_per_s * 1e9),
        source=source,
    )


def _cloud(machine_type: str, *, ram_gib: int, cores: int, disk_gb: int) -> tuple[Device, Device]:
    """RAM and network disk of one of Google Cloud's machine types."""
    source = f"Google Cloud {machine_type}: specified, {cores} cores; {_PER_CORE}"
    return (
        _ram(ram_gib, used_gib=1, gb_per_s=10 * cores, source=source),
        _disk(disk_gb, used_gb=30, gb_per_s=0.5, source="typical network disk"),
    )


_GB = 10**9
_T4 = _Card("Tesla T4", 14_913 * _MIB, 320 * _GB, "NVIDIA T4 data sheet")
_L4 = _Card("NVIDIA L4", 22_558 * _MIB, 300 * _GB, "NVIDIA L4 data sheet")
_RTX_3060 = _Card("NVIDIA GeForce RTX 3060", 11_931 * _MIB, 360 * _GB, "192 bits of GDDR6 at 15 Gbit/s")
_RTX_3090 = _Card("NVIDIA GeForce RTX 3090", 24_125 * _MIB, 936 * _GB, "384 bits of GDDR6X at 19.5 Gbit/s")
_RTX_4090 = _Card("NVIDIA GeForce RTX 4090", 24_084 * _MIB, 1_008 * _GB, "384 bits of GDDR6X at 21 Gbit/s")
_A100_40 = _Card("NVIDIA A100-SXM4-40GB", 40_335 * _MIB, 1_555 * _GB, "NVIDIA A100 data sheet (SXM)")
_A100_80 = _Card("NVIDIA A100-SXM4-80GB", 81_039 * _MIB, 2_039 * _GB, "NVIDIA A100 data sheet (SXM)")
_H100 = _Card("NVIDIA H100 80GB HBM3", 80_998 * _MIB, 3_350 * _GB, "NVIDIA H100 data sheet (SXM)")
_CARDS = (_T4, _L4, _RTX_3060, _RTX_3090, _RTX_4090, _A100_40, _A100_80, _H100)

# A machine with two virtual cores read 20 GB/s; the others are taken to go with their cores.
_PER_CORE = "bandwidth an estimate, 10 GB/s a virtual core"
_COLAB = (
    _ram(12.7, used_gib=1.2, gb_per_s=20, source=f"typical of Colab, 2 cores; {_PER_CORE}"),
    _disk(112, used_gb=42, gb_per_s=0.2, source="typical of a GPU session in Colab"),
)
_KAGGLE = (
    _ram(29, used_gib=1.2, gb_per_s=40, source=f"Kaggle's documentation, 4 cores; {_PER_CORE}"),
    _disk(20, used_gb=0, gb_per_s=0.2, source="the output folder by Kaggle's documentation; speed typical"),
)
# What a 32 or 64 GB desktop shows: firmware and graphics have taken their 2 %.
_DDR4 = "a typical desktop; bandwidth: peak of 2 channels of DDR4-3200"
_DDR5 = "a typical desktop; bandwidth: peak of 2 channels of DDR5-5600"
_SSD_PCIE3 = _disk(1_000, used_gb=400, gb_per_s=3, source="typical NVMe SSD (PCIe 3)")
_SSD_PCIE4 = _disk(2_000, used_gb=400, gb_per_s=6, source="typical NVMe SSD (PCIe 4)")
_DESKTOP_32 = (_ram(31.2, used_gib=3, gb_per_s=51.2, source=_DDR4), _SSD_PCIE3)
_DESKTOP_64 = (_ram(62.7, used_gib=3, gb_per_s=51.2, source=_DDR4), _SSD_PCIE3)
_DESKTOP_64_DDR5 = (_ram(62.7, used_gib=3, gb_per_s=89.6, source=_DDR5), _SSD_PCIE4)
_LAPTOP = (
    _ram(15.5, used_gib=3, gb_per_s=51.2, source="typical laptop; bandwidth: peak of 2 channels of DDR4-3200"),
    _disk(512, used_gb=200, gb_per_s=3, source="typical NVMe SSD (PCIe 3)"),
)
_DGX_A100 = (
    _ram(2_000, used_gib=8, gb_per_s=409.6, source="DGX A100 data sheet; bandwidth: peak of 16 channels of DDR4-3200"),
    _disk(30_000, used_gb=100, gb_per_s=20, source="DGX A100 data sheet; speed typical"),
)
# In use: the server (190 MB) and a kernel with torch and widgets (325 MB), as measured.
_BINDER = (
    _ram(2, used_gib=0.5, gb_per_s=20, source=f"the limit by Binder's documentation; {_PER_CORE}, taken as 2"),
    _disk(10, used_gb=0, gb_per_s=0.1, source="typical of Binder, shared with others"),
)

# Name -> (the card, how many of it, the RAM and disk around them).
_PRESETS: dict[str, tuple[_Card | None, int, tuple[Device, Device]]] = {
    "Colab T4": (_T4, 1, _COLAB),
    "Kaggle 2x T4": (_T4, 2, _KAGGLE),
    "L4": (_L4, 1, _cloud("g2-standard-8", ram_gib=32, cores=8, disk_gb=200)),
    "RTX 3060 12 GB": (_RTX_3060, 1, _DESKTOP_32),
    "RTX 3090": (_RTX_3090, 1, _DESKTOP_64),
    "RTX 4090": (_RTX_4090, 1, _DESKTOP_64_DDR5),
    "2x RTX 4090": (_RTX_4090, 2, _DESKTOP_64_DDR5),
    "A100 40 GB": (_A100_40, 1, _cloud("a2-highgpu-1g", ram_gib=85, cores=12, disk_gb=500)),
    "A100 80 GB": (_A100_80, 1, _cloud("a2-ultragpu-1g", ram_gib=170, cores=12, disk_gb=500)),
    "H100 80 GB": (_H100, 1, _cloud("a3-highgpu-1g", ram_gib=234, cores=26, disk_gb=1_000)),
    "8x A100 80 GB": (_A100_80, 8, _DGX_A100),
    "16 GB laptop": (None, 0, _LAPTOP),
    "Binder (2 GB)": (None, 0, _BINDER),
}
