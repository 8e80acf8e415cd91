from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import pytest

import workbench as wb
from workbench.speed import _TYPICAL, PCIE_BYTES_PER_S, known_calibration

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def speed(recipe: wb.Recipe, machine: wb.Machine | None = None) -> float | None:
    placement = wb.place(recipe, machine=machine)
    found = wb.predict_speed(placement, wb.read_skeleton(recipe.model))
    return None if found is None else found.tokens_per_second


@pytest.fixture(autouse=True)
def uncalibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo_model: Path) -> None:
    """No measurement of this machine, whoever made one before."""
    monkeypatch.setenv("WORKBENCH_CACHE_DIR", str(tmp_path))


def test_by_hand_on_a_gpu(tiny_llama: Path) -> None:
    """All on a GPU: 0.7 of its bandwidth for every byte but the embedding's, a launch for each leaf module."""
    recipe = wb.Recipe(model=str(tiny_llama))
    machine = wb.Machine.preset("RTX 4090")
    placement = wb.place(recipe, machine=machine)
    assert placement.device_map == {"": 0}
    # 279,168 bytes less 512 * 64 * 2 of the embedding; leaves: the embedding, 2 * (q, k, v, o, gate, up, down, the
    # activation, 2 norms), the last norm, the rotary embedding, the head
    seconds = _TYPICAL.token_seconds + 24 * 15e-6 + (279_168 - 65_536) / (1_008e9 * 0.7)
    found = wb.predict_speed(placement, wb.read_skeleton(recipe.model))
    assert found is not None
    assert found.tokens_per_second == pytest.approx(1 / seconds, rel=1e-6)
    assert not found.calibrated


def test_slower_places_are_slower(demo_model: Path) -> None:
    gpu = speed(wb.Recipe(model=str(demo_model)), wb.Machine.preset("RTX 4090"))
    memory = speed(wb.Recipe(model=str(demo_model)))
    half = speed(wb.Recipe(model=str(demo_model), max_memory={"cpu": "200MiB", "disk": "10GiB"}))
    all_of_it = {"model": str(demo_model), "strategy": "custom", "device_map": {"": "disk"}}
    disk = speed(wb.Recipe(**all_of_it, max_memory={"cpu": "100MiB", "disk": "10GiB"}))
    assert speed(wb.Recipe(**all_of_it)) == memory  # it stays in memory once it has been read
    assert gpu is not None
    assert memory is not None
    assert half is not None
    assert disk is not None
    assert gpu > memory > half > disk > 0


def test_a_token_reads_only_the_experts_that_it_chooses(tiny_model: Callable[[str], Path]) -> None:
    from workbench.speed import _profile

    profile = _profile(wb.read_skeleton(str(tiny_model("mixtral"))), wb.FullPrecision())
    shares = {tensor.share for part in profile.values() for tensor in part.tensors}
    assert shares == {0.0, 0.5, 1.0}  # the embedding's row, 2 of 4 experts, everything else


def test_no_estimate_is_better_than_a_guess(tiny_llama: Path) -> None:
    recipe = wb.Recipe(model=str(tiny_llama), precision=wb.Int8())
    assert speed(recipe, wb.Machine.preset("RTX 4090")) is None
    assert speed(wb.Recipe(model=str(tiny_llama), max_memory={"cpu": "1KiB"})) is None


def test_measurements_that_make_no_sense_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "calibration.json"
    monkeypatch.setattr("workbench.speed._calibration_file", lambda: file)
    file.write_text(json.dumps(asdict(_TYPICAL)))
    assert known_calibration() == _TYPICAL
    file.write_text(json.dumps(asdict(replace(_TYPICAL, small_bytes_per_s={"bfloat16": 11e9, "float32": -4e9}))))
    assert known_calibration() is None
    file.write_text("{")
    assert known_calibration() is None


def test_loads_by_hand(tiny_llama: Path, tmp_path: Path) -> None:
    """21 tensors of 139,584 weights: mapped as they are, converted, quantized, copied to a GPU."""

    def load_seconds(machine: wb.Machine, **choices: Any) -> float:
        recipe = wb.Recipe(model=str(tiny_llama), **choices)
        found = wb.predict_load_seconds(wb.place(recipe, machine=machine), wb.read_skeleton(recipe.model))
        assert found is not None
        return found

    laptop, gpu = wb.Machine.preset("16 GB laptop"), wb.Machine.preset("RTX 4090")
    base = _TYPICAL.load_seconds + 21 * _TYPICAL.load_tensor_seconds
    assert load_seconds(laptop) == pytest.approx(base)
    disk = laptop.device("disk").bandwidth_bytes_per_s
    from_disk = 0 if disk is None else 279_168 / disk
    converted = base + from_disk + 558_336 / _TYPICAL.convert_bytes_per_s
    assert load_seconds(laptop, precision=wb.FullPrecision(dtype="float32")) == pytest.approx(converted)
    assert load_seconds(laptop, precision=wb.FourBit()) > base
    assert load_seconds(gpu) > base

    # What is quantized in its file is read as it is.
    config = json.loads((tiny_llama / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    packed = wb.Recipe(model=str(tmp_path))
    placement = wb.place(packed, machine=gpu)
    skeleton = wb.read_skeleton(packed.model)
    assert placement.total_bytes < 279_168
    read = placement.total_bytes / PCIE_BYTES_PER_S + (0 if disk is None else placement.total_bytes / disk)
    assert wb.predict_load_seconds(placement, skeleton) == pytest.approx(base + read, rel=0.01)
    assert wb.predict_load_seconds(wb.place(packed, machine=laptop), skeleton) == pytest.approx(base)


def test_small_matrices_are_read_more_slowly() -> None:
    def rate(size_bytes: int) -> float:
        return size_bytes / _TYPICAL.read_seconds(size_bytes, "bfloat16")

    assert rate(2**20) == pytest.approx(11e9)
    assert rate(2**20) < rate(2**23) < rate(2**25) == pytest.approx(20e9)
    assert rate(2**30) == pytest.approx(20e9)


def test_a_measured_machine(demo_model: Path) -> None:
    """Measure this one; the estimate then says that it rests on that, and is in the region of what is measured."""
    assert known_calibration() is None
    found = wb.calibrate()
    assert known_calibration() == found
    assert found.module_seconds > 0
    assert min(found.large_bytes_per_s.values()) > 1e6
    session = wb.load(wb.Recipe(model=str(demo_model)))
    session.generate("Hello", max_new_tokens=4)
    session.generate("Tell me a story.", max_new_tokens=20)
    stats = session.last_stats
    predicted = wb.predict_speed(session.placement, session.skeleton)
    session.unload()
    assert stats is not None
    assert predicted is not None
    assert predicted.calibrated
    # Tests share their machine with other work, so only the order of magnitude can be held here; benchmarks/speed.py
    # compares closely.
    assert 1 / 10 < predicted.tokens_per_second / stats.tokens_per_second < 10
