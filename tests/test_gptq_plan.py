"""What a quantization will take, on machines that are not here: each figure that is asserted is worked out by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import workbench as wb

if TYPE_CHECKING:
    from pathlib import Path

GIB = 1 << 30
HIDDEN, WIDE, LAYERS, VOCABULARY = 4096, 14_336, 32, 128_256
SAMPLES, LENGTH = 64, 512
TEXT = wb.CalibrationText(samples=SAMPLES, sequence_length=LENGTH)


@pytest.fixture(scope="module")
def eight_billion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a Llama with 8 billion parameters; there are no weights."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("plans") / "eight"
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=WIDE,
        num_hidden_layers=LAYERS,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        dtype="bfloat16",
    ).save_pretrained(folder)
    return folder


def machine(gpu: float, ram: float, gpus: int = 1) -> wb.Machine:
    """A machine that gives so many GiB and keeps nothing back."""
    sizes: list[tuple[int | str, float]] = [*((i, gpu) for i in range(gpus)), ("cpu", ram)]
    devices = tuple(
        wb.Device(
            id=id_, name=str(id_), total_bytes=int(size * GIB), free_bytes=int(size * GIB), reserved_bytes=0,
            reserved_for="nothing", bandwidth_bytes_per_s=None, source="a test",
        )
        for id_, size in sizes
    )  # fmt: skip
    return wb.Machine(name="test", devices=devices)


def plan(model: Path, where: wb.Machine, **choices: object) -> wb.QuantizePlan:
    recipe = wb.Recipe(model=str(model), precision=wb.GPTQ(), **choices)
    return wb.plan_quantization(recipe, calibration=TEXT, machine=where)


def test_whole_on_the_gpu_if_it_can_be(eight_billion: Path) -> None:
    found = plan(eight_billion, machine(24, 32))
    assert found.verdict == "fits"
    assert set(found.placement.device_map.values()) == {0}
    layer = 2 * HIDDEN * HIDDEN + 2 * 1024 * HIDDEN + 3 * HIDDEN * WIDE
    weights = 2 * (LAYERS * (layer + 2 * HIDDEN) + 2 * VOCABULARY * HIDDEN + HIDDEN)
    assert 0 <= found.memory[0].weight_bytes - weights < 4096  # and the buffers of rotary frequencies
    hidden = SAMPLES * LENGTH * HIDDEN * 2
    assert found.hidden_bytes == hidden
    assert found.kept_bytes == GIB
    # One Hessian of down_proj; three more squares, and six copies in float32 of down_proj, or of all others at worst.
    outputs = 2 * HIDDEN + 2 * 1024 + 2 * WIDE
    down, others = 4 * WIDE * (3 * WIDE + 6 * HIDDEN), 4 * HIDDEN * (3 * HIDDEN + 6 * outputs)
    assert found.memory[0].work_bytes == 2 * hidden + GIB + 4 * WIDE**2 + max(down, others)
    groups = layer // 128
    inputs = LAYERS * (6 * HIDDEN + WIDE)
    packed = LAYERS * (layer // 2 + 2 * groups + groups // 2) + 4 * inputs
    assert found.output_bytes == packed + 2 * (2 * VOCABULARY * HIDDEN + (2 * LAYERS + 1) * HIDDEN)
    assert found.disk_bytes == 2 * found.output_bytes
    assert str(found).splitlines() == list(found.lines)


def test_else_layers_wait_on_the_cpu_with_room_for_the_work(eight_billion: Path) -> None:
    where = machine(12, 32)
    found = plan(eight_billion, where)
    assert found.verdict == "offloads"
    assert "layers wait on the CPU" in found.summary
    assert all(memory.free_bytes >= 0 for memory in found.memory.values())
    assert found.placement.waiting
    # What is loaded has the same budgets, and so the same map.
    again = wb.place(found.placement.recipe, machine=where)
    assert again.device_map == found.placement.device_map
    assert again.verdict == "offloads"


def test_several_gpus_each_have_room(eight_billion: Path) -> None:
    found = plan(eight_billion, machine(16, 32, gpus=2))
    assert found.verdict == "fits"
    assert set(found.placement.device_map.values()) == {0, 1}
    assert found.memory[0].work_bytes == found.memory[1].work_bytes


def test_budgets_of_ones_own_stay_and_advice_with_numbers_works(eight_billion: Path) -> None:
    where = machine(12, 32)
    found = plan(eight_billion, where, max_memory={0: "12GiB", "cpu": "20GiB"})
    assert found.placement.recipe.max_memory == {0: "12GiB", "cpu": "20GiB"}
    assert found.verdict == "does_not_fit"
    assert "beside the weights on cuda:0" in found.summary
    advice = found.advice[0]
    assert advice.startswith("Set the budgets to cuda:0 ")
    followed = plan(eight_billion, where, **advice.changes)
    assert followed.verdict == "offloads"
    assert f"{len(followed.placement.waiting)} layers wait on the CPU" in advice


def test_what_is_kept_gives_way_before_anything_is_refused(eight_billion: Path) -> None:
    roomy = plan(eight_billion, machine(0.001, 64)).memory["cpu"]
    base = (roomy.weight_bytes + roomy.work_bytes - GIB) / GIB
    tight = plan(eight_billion, machine(0.001, base + 0.25))
    assert tight.verdict == "fits"
    assert abs(tight.kept_bytes - GIB // 4) < 4096


def test_fewer_samples_where_that_is_enough(eight_billion: Path) -> None:
    roomy = plan(eight_billion, machine(0.001, 64)).memory["cpu"]
    base = (roomy.weight_bytes + roomy.work_bytes - GIB) / GIB
    found = plan(eight_billion, machine(0.001, base - 0.2))  # half of the sequences take a quarter of a GiB less
    assert found.verdict == "does_not_fit"
    assert found.advice == ("Calibrate with 32 samples in place of 64: then there is room.",)


def test_too_large_is_a_verdict_and_quantize_says_it(eight_billion: Path, tmp_path: Path) -> None:
    found = plan(eight_billion, machine(4, 8))
    assert found.verdict == "does_not_fit"
    assert "have to be in memory while GPTQ changes them" in found.summary
    assert found.advice == (
        "Close other programs, give the CPU and the GPUs more, or quantize it on a larger machine.",
    )
    recipe = wb.Recipe(model=str(eight_billion), precision=wb.GPTQ(), max_memory={"cpu": "2GiB"})
    with pytest.raises(ValueError, match=r"Does not fit: all 15\.0 GiB of weights have to be in memory"):
        wb.quantize(recipe, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_all_hessians_at_once_without_true_sequential(tiny_llama: Path) -> None:
    found = []
    for true_sequential in (True, False):
        precision = wb.GPTQ(group_size=32, true_sequential=true_sequential)
        recipe = wb.Recipe(model=str(tiny_llama), precision=precision, workload=wb.Workload(context_length=128))
        text = wb.CalibrationText(samples=512, sequence_length=128)
        found.append(wb.plan_quantization(recipe, calibration=text, machine=machine(0.001, 8)).memory["cpu"])
    # Six modules with 64 inputs and one with 128, in place of the largest one alone.
    assert found[1].work_bytes - found[0].work_bytes == 6 * 4 * 64**2
