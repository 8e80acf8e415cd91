"""Quantize to nf4 and fp4 on the CPU to the same bytes as bitsandbytes, several times faster.

bitsandbytes searches the 15 bounds between codes for every weight, in passes over the whole matrix. Here a piece of it
that stays in the processor's cache goes through at a time, and a table takes the search's place: the line from -1 to 1
is cut into cells so narrow that none holds two bounds, so a cell and one comparison say the code. Pieces are too small
for torch to share out over its threads, so other programs' work makes nothing wait; threads of our own take turns.
"""

from __future__ import annotations

import contextlib
import functools
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_OPERATOR = "bitsandbytes::quantize_4bit"
_CELLS = 1024
_PIECE = 1 << 15  # weights; torch splits operators beyond that over its own threads


@contextlib.contextmanager
def fast_quantization(check: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Let bitsandbytes quantize 4-bit weights on the CPU with :func:`quantize` in this block.

    It does nothing where bitsandbytes is not installed or brings a CPU kernel of its own.

    Args:
        check: Called every few milliseconds; raises to stop.
    """
    import importlib.util

    if importlib.util.find_spec("bitsandbytes") is None:
        yield
        return
    import bitsandbytes  # noqa: F401 - defines the operator
    import torch

    if torch._C._dispatch_has_kernel_for_dispatch_key(_OPERATOR, "CPU"):  # noqa: SLF001 - the only way to ask
        yield
        return
    library: Any = torch.library.Library("bitsandbytes", "IMPL")  # type: ignore[no-untyped-call]
    try:
        with ThreadPoolExecutor(max_workers=torch.get_num_threads(), thread_name_prefix="workbench-quantize") as pool:
            library.impl("quantize_4bit", functools.partial(quantize, pool=pool, check=check), "CPU")
            yield
    finally:
        library._destroy()  # noqa: SLF001 - what torch does when the object dies, but now


def quantize(
    weight: Any,
    block: int,
    quant_type: str,
    storage: Any,
    *,
    pool: ThreadPoolExecutor | None = None,
    check: Callable[[], None] = lambda: None,
) -> tuple[Any, Any]:
    """Quantize a tensor in blocks of weights that share one scale.

    Args:
        weight: On the CPU, bfloat16, float16 or float32, of any shape.
        block: Weights to a block.
        quant_type: ``"nf4"`` or ``"fp4"``.
        storage: The dtype in which the packed codes are kept.
        pool: Threads to share the work; None does it here.
        check: Called every few milliseconds; raises to stop.

    Returns:
        The packed codes, two to a byte, (n, 1); and the float32 scales, one for each block.
    """
    import torch

    flat = weight.reshape(-1)
    whole = flat.numel() - flat.numel() % block
    scales = torch.empty(-(-flat.numel() // block), dtype=torch.float32)
    packed = torch.empty(-(-flat.numel() // 2), dtype=torch.uint8)
    pieces = range(0, whole, _PIECE)
    shares = [pieces[first :: torch.get_num_threads()] for first in range(torch.get_num_threads())]
    work = functools.partial(_quantize_pieces, flat[:whole], block, quant_type, scales, packed, check)
    if pool is None or len(pieces) == 1:
        work(pieces)
    else:
        for done in [pool.submit(work, share) for share in shares if share]:
            done.result()
    if whole < flat.numel():
        # bitsandbytes divides here, where it multiplies by the inverse elsewhere: the last bit may differ.
        rest = flat[whole:].float()
        scale = rest.abs().max().clamp(min=1e-38)
        scales[-1] = scale
        rest = torch.nn.functional.pad((rest / scale).clamp(-1, 1), (0, rest.numel() % 2))
        packed[whole // 2 :] = _pack(_search(rest, quant_type))
    return packed.view(storage).unsqueeze(1), scales


class _Table:
    """What says the code of a number from -1 to 1.

    Attributes:
        bounds: Between the codes, rising.
        order: The codes that they part, from the least value to the greatest.
        inside: For each cell the bound in it, or infinity.
        codes: For each cell the code below that bound; then, for each, the code above.
    """

    def __init__(self, quant_type: str) -> None:
        import torch
        from bitsandbytes.functional import get_4bit_type

        values = get_4bit_type(quant_type, device="cpu")
        order = torch.argsort(values)
        self.bounds = (values[order[:-1]] + values[order[1:]]) / 2
        self.order = order.to(torch.uint8)
        home = _place(self.bounds, torch.empty_like(self.bounds)).to(torch.int64)
        before = torch.searchsorted(home, torch.arange(_CELLS + 1))
        self.inside = torch.full((_CELLS + 1,), float("inf"))
        self.inside[home] = self.bounds
        self.codes = torch.cat((self.order[before], self.order[(before + 1).clamp(max=len(order) - 1)]))


_table = functools.cache(_Table)


def _place(numbers: Any, out: Any) -> Any:
    """Where on the cells numbers from -1 to 1 are. It is rounded on the way, which changes no two numbers' order."""
    import torch

    return torch.add(numbers, 1.0, out=out).mul_(_CELLS / 2)


def _search(numbers: Any, quant_type: str) -> Any:
    """The codes of any numbers, as bitsandbytes finds them."""
    import torch

    table = _table(quant_type)
    return table.order[torch.bucketize(numbers, table.bounds)]


def _pack(codes: Any) -> Any:
    """Two codes to a byte, the first in its upper half."""
    import torch

    pairs = codes.view(torch.int16)  # the first is the lower byte
    return (pairs << 4) | (pairs >> 8)


def _quantize_pieces(  # noqa: PLR0917 - of a partial
    flat: Any,
    block: int,
    quant_type: str,
    scales: Any,
    packed: Any,
    check: Callable[[], None],
    starts: range,
) -> None:
    import torch

    table, size = _table(quant_type), min(_PIECE, flat.numel())
    numbers, beside = torch.empty(size), torch.empty(size)
    cells, above = torch.empty(size, dtype=torch.int32), torch.empty(size, dtype=torch.int32)
    codes = torch.empty(size, dtype=torch.uint8)
    for start in starts:
        check()
        end = min(start + size, flat.numel())
        x, y, cell, is_above, code = (t[: end - start] for t in (numbers, beside, cells, above, codes))
        x.copy_(flat[start:end])
        scale = scales[start // block : end // block]
        torch.amax(torch.abs(x, out=y).view(-1, block), dim=-1, out=scale)
        x.view(-1, block).mul_((1.0 / scale.clamp(min=1e-38)).view(-1, 1)).clamp_(-1, 1)
        if torch.isfinite(scale.sum()):
            cell.copy_(_place(x, y))
            torch.index_select(table.inside, 0, cell, out=y)
            cell.add_(torch.gt(x, y, out=is_above), alpha=_CELLS + 1)
            torch.index_select(table.codes, 0, cell, out=code)
        else:  # what is no number is in no cell
            code.copy_(_search(x, quant_type))
        packed[start // 2 : end // 2].copy_(_pack(code))
