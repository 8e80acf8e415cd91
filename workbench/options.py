"""Checks that the options of every precision share; each raises one sentence that says what would be right."""

from __future__ import annotations

from typing import Any

DTYPES = ("float32", "bfloat16", "float16")


def element_bytes(dtype: str) -> int:
    """Bytes of one number of a floating-point type, by its name: ``"bfloat16"``."""
    return {"float64": 8, "float32": 4}.get(dtype, 2)


def check_skip_modules(precision: Any) -> None:
    """Make a precision's ``skip_modules`` a tuple.

    Raises:
        ValueError: If it is no sequence of names.
    """
    skip = precision.skip_modules
    if isinstance(skip, str) or not all(isinstance(name, str) and name for name in skip):
        raise ValueError(f"skip_modules is a sequence of module names such as ('lm_head',), not {skip!r}.")
    object.__setattr__(precision, "skip_modules", tuple(skip))


def check_switches(precision: Any, *names: str) -> None:
    """Make sure that options are True or False.

    Raises:
        ValueError: If one is neither.
    """
    for name in names:
        if not isinstance(getattr(precision, name), bool):
            raise ValueError(f"{name} is True or False, not {getattr(precision, name)!r}.")  # noqa: TRY004 - one kind of error for bad input


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Make sure that an option is one of a few.

    Raises:
        ValueError: If it is none of them.
    """
    if isinstance(value, bool) or value not in choices:
        raise ValueError(f"{name} is one of {', '.join(map(repr, choices))}, not {value!r}.")
