"""The magnitudes that int8 would look at, against a direct computation and against bitsandbytes itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

import workbench as wb
from workbench.int8_outliers import ModuleOutliers, outliers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PROMPT = "What is the capital of France?"


@pytest.fixture(scope="module")
def session(demo_model: Path) -> Iterator[wb.Session]:
    made = wb.load(wb.Recipe(model=str(demo_model), precision=wb.Int8()))
    yield made
    made.unload()


def inputs_of(session: wb.Session, name: str) -> torch.Tensor:
    """What goes into a module, caught by hand: (tokens, columns)."""
    caught: list[torch.Tensor] = []
    hook = session.model.get_submodule(name).register_forward_hook(lambda _m, args, _o: caught.append(args[0]))
    with torch.inference_mode():
        session.model(**session._encode(PROMPT, None))
    hook.remove()
    return caught[0][0]


def test_against_a_direct_computation(session: wb.Session) -> None:
    report = outliers(session, PROMPT)
    assert (report.threshold, report.tokens) == (6.0, session._encode(PROMPT, None)["input_ids"].shape[1])
    # Seven linear modules in each of 30 layers; the head shares the embedding's weight and stays as it is.
    assert len(report.modules) == 210
    assert report.layers == tuple(range(30))
    by_name = {m.name: m for m in report.modules}
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.17.mlp.down_proj", "model.layers.29.mlp.up_proj"):
        peaks = inputs_of(session, name).half().abs().amax(0).float()
        found = by_name[name]
        assert list(found.peaks) == sorted(peaks.tolist())
        assert found.largest == float(peaks.max())
        for threshold in (0.5, 3.0, 6.0):
            assert found.above(threshold) == int((peaks >= threshold).sum())
        assert found.rows == session.model.get_submodule(name).out_features
    # By hand for a layer: columns times outputs, over all columns times outputs.
    layer = [m for m in report.modules if m.layer == 5]
    whole = sum(m.rows * len(m.peaks) for m in layer)
    assert report.share(1.0, layer=5) == sum(m.rows * sum(p >= 1.0 for p in m.peaks) for m in layer) / whole
    assert report.share(0.0) == 0.0
    assert report.share(1e-9) == pytest.approx(1.0, abs=0.01)
    assert report.share(3.0) >= report.share(6.0) > 0
    assert f"{report.share():.2%} of the multiplications are in 16 bits" in report.lines[1]


def test_bitsandbytes_takes_the_same_columns(session: wb.Session) -> None:
    report = outliers(session, PROMPT)
    with torch.inference_mode():
        session.model(**session._encode(PROMPT, None))
    seen = 0
    for module in report.modules:
        columns = session.model.get_submodule(module.name).state.idx
        assert len(columns) == module.above(6.0), module.name
        seen += len(columns)
    assert seen > 0


def test_skipped_modules_are_left_out(tiny_llama: Path) -> None:
    recipe = wb.Recipe(model=str(tiny_llama), precision=wb.Int8(threshold=2, skip_modules=("lm_head", "down_proj")))
    session = wb.load(recipe)
    report = outliers(session, "Hello")
    assert {m.name.rpartition(".")[2] for m in report.modules} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
    }  # fmt: skip
    assert report.threshold == 2.0
    bad: list[tuple[dict[str, str | float], str]] = [
        ({"prompt": ""}, "Give a prompt"),
        ({"prompt": "x", "threshold": 21}, "threshold is a number from 0 to 20"),
    ]
    for options, sentence in bad:
        with pytest.raises(ValueError, match=sentence):
            outliers(session, **options)
    session.unload()
    with pytest.raises(ValueError, match="unloaded: load it again"):
        outliers(session, "Hello")


def test_no_threshold_is_no_outliers() -> None:
    module = ModuleOutliers(name="a", layer=0, rows=2, peaks=(0.5, 1.0, 8.0))
    assert [module.above(t) for t in (0.0, 0.1, 1.0, 1.1, 9.0)] == [0, 3, 2, 1, 0]
    assert (module.largest, module.typical) == (8.0, 1.0)


def test_on_any_precision(tiny_llama: Path) -> None:
    session = wb.load(wb.Recipe(model=str(tiny_llama)))
    assert len(outliers(session, "Hello").modules) == 14  # the head stays as it is
    session.unload()
