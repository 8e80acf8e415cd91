"""The four named strategies, planned by transformers' own planner for a machine that need not be this one.

With skeleton.py and sizes.py, the only file that touches parts of transformers and accelerate that are not their public
API; tests/test_placement.py compares the results with ``from_pretrained`` itself and fails when those parts change.
"""

from __future__ import annotations

import logging
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from workbench.precision import HQQ
from workbench.sizes import stored_element_sizes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from workbench.hardware import DeviceId
    from workbench.precision import Precision
    from workbench.recipe import Recipe
    from workbench.skeleton import MetaModel, Skeleton


class _ElementSizes:
    """Answers the planner's one question to a quantizer from memory: it asks for every tensor, several times a plan."""

    def __init__(self, skeleton: Skeleton, meta: MetaModel, precision: Precision) -> None:
        self._sizes: dict[int, float]
        tensors = (*meta.module.named_parameters(), *meta.module.named_buffers())
        quantizer: Any = meta.quantizer
        if quantizer is None:
            sizes = stored_element_sizes(skeleton, meta, precision)
            self._sizes = {id(t): sizes.get(name, t.element_size()) for name, t in tensors}
        else:
            self._sizes = {id(t): quantizer.param_element_size(meta.module, name, t) for name, t in tensors}

    def param_element_size(self, model: Any, param_name: str, param: Any) -> float:  # noqa: ARG002 - as it is called
        return self._sizes[id(param)]


_all_element_sizes: weakref.WeakKeyDictionary[MetaModel, _ElementSizes] = weakref.WeakKeyDictionary()


def _element_sizes(skeleton: Skeleton, meta: MetaModel, precision: Precision) -> _ElementSizes:
    if meta not in _all_element_sizes:
        _all_element_sizes[meta] = _ElementSizes(skeleton, meta, precision)
    return _all_element_sizes[meta]


def plan(recipe: Recipe, skeleton: Skeleton, budgets: Mapping[DeviceId, int]) -> dict[str, DeviceId]:
    """What ``from_pretrained(device_map=strategy, max_memory=budgets)`` computes; "disk" where nothing has room."""
    from transformers.integrations import accelerate as planner

    meta = skeleton.meta_model(recipe.precision)
    strategy, module, quantizer = recipe.strategy, meta.module, meta.quantizer
    as_they_are = quantizer is None and not meta.stored and not isinstance(recipe.precision, HQQ)
    sizes = None if as_they_are else _element_sizes(skeleton, meta, recipe.precision)
    no_split: Any = module._no_split_modules  # noqa: SLF001 - see the module's docstring
    if recipe.no_split_module_classes is not None:
        no_split = set(recipe.no_split_module_classes)
    try:
        with _without_warnings_about_absent_devices():
            if strategy == "sequential":
                memory = planner.get_max_memory(dict(budgets))
            else:
                memory = planner.get_balanced_memory(
                    module,
                    max_memory=dict(budgets),
                    no_split_module_classes=no_split,
                    hf_quantizer=sizes,
                    low_zero=strategy == "balanced_low_0",
                )
            if quantizer is not None:
                memory = quantizer.adjust_max_memory(memory)
            if recipe.fallback_allocation:
                return _plan_with_fallback(meta, sizes, memory, no_split, offload_buffers=recipe.offload_buffers)
            return dict(
                planner.infer_auto_device_map(
                    module,
                    max_memory=memory,
                    no_split_module_classes=no_split,
                    offload_buffers=recipe.offload_buffers,
                    hf_quantizer=sizes,
                    no_placement_params=getattr(module, "_no_placement_params", None),
                )
            )
    except (
        KeyError,
        IndexError,
        ValueError,
    ) as error:  # its own code fails on some budgets, such as low_0 without GPU 0
        raise ValueError(
            f"transformers cannot plan strategy {strategy!r} for these budgets ({type(error).__name__}: {error}); "
            "choose another strategy, or a custom device_map."
        ) from error


def _plan_with_fallback(
    meta: MetaModel,
    sizes: _ElementSizes | None,
    memory: dict[DeviceId, int],
    no_split: Any,
    *,
    offload_buffers: bool,
) -> dict[str, DeviceId]:
    """Accelerate's planner, which transformers' was made from and which alone can fall back to another module."""
    import torch
    from accelerate.utils import CustomDtype, infer_auto_device_map

    special: dict[str, Any] = {}
    if sizes is not None:
        smaller = {0.5: CustomDtype.INT4, 1: torch.int8}
        for name, tensor in meta.module.named_parameters():
            size = sizes.param_element_size(meta.module, name, tensor)
            if size < tensor.element_size():
                special[name] = smaller.get(size, torch.int8)
    return dict(
        infer_auto_device_map(
            meta.module,
            max_memory=memory,
            no_split_module_classes=list(no_split or ()),
            special_dtypes=special,
            offload_buffers=offload_buffers,
            fallback_allocation=True,
        )
    )


@contextmanager
def _without_warnings_about_absent_devices() -> Iterator[None]:
    """Planning for a machine that is not this one is the point here, so it is nothing to warn about."""
    loggers = [
        logging.getLogger(name) for name in ("accelerate.utils.modeling", "transformers.integrations.accelerate")
    ]
    quiet = logging.Filter("nobody.logs.under.this.name")
    for logger in loggers:
        logger.addFilter(quiet)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(quiet)
