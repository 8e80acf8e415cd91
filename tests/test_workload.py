"""Cache and activations: foretold from a run on ``meta``, compared with real runs on the CPU."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest
from architectures import tiny_config

from workbench.placement import place
from workbench.precision import FourBit, FullPrecision, Int8
from workbench.recipe import Recipe
from workbench.rehearsal import Rehearsal
from workbench.skeleton import Skeleton, read_skeleton
from workbench.workload import Cost, Curve, Workload, measure_cost

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from workbench.precision import Precision

# Around the lengths at which the cost is measured (9, 27, 129, the longest) and the windows (gemma3: 80, gpt-oss: 128,
# mistral: 200), and past all of them. A window shorter than 27 tokens, which no published model has, is not seen.
LENGTHS = (1, 2, 9, 31, 64, 79, 80, 81, 127, 128, 129, 199, 200, 201, 256, 300)
# Types whose forward steps through the tokens, or through pieces of the prompt, in Python; and others whose cache or
# layers are unlike most.
STEPPING = (
    "bailing_hybrid",
    "falcon_mamba",
    "kimi_linear",
    "mamba",
    "minimax",
    "olmo_hybrid",
    "qwen3_5_text",
    "qwen3_next",
    "qwen4_exp_text",
    "recurrent_gemma",
    "rwkv",
)
UNUSUAL = (
    "bart",
    "cpmant",
    "gemma3n_text",
    "gemma4_text",
    "hrm_text",
    "jetmoe",
    "llama4_text",
    "longcat_flash",
    "zamba2",
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """A second thread slows these tiny models down, and much so on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def measured(skeleton: Skeleton, precision: Precision) -> Cost | None:
    names = [block.name for block in skeleton.blocks]
    module = skeleton.meta_model(precision).module
    return measure_cost(module, names, skeleton.decoder_blocks, context_length=skeleton.context_length)


def cost_of(folder: Path, precision: Precision) -> Cost:
    cost = measured(read_skeleton(str(folder)), precision)
    assert cost is not None
    return cost


def tiny_skeleton(model_type: str, folder: Path) -> Skeleton:
    """A skeleton needs no weights: the config alone is saved."""
    import torch

    config = tiny_config(model_type)
    config.dtype = torch.bfloat16
    if model_type == "bart":
        config.architectures = ["BartForCausalLM"]
    config.save_pretrained(folder)
    return read_skeleton(str(folder))


def real_model(skeleton: Skeleton) -> Any:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return skeleton.model_class(skeleton.config).to(torch.bfloat16).eval()


def tensors_with_a_batch(value: Any, seen: set[int]) -> Iterator[Any]:
    import torch

    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        if value.dim() > 1:
            yield value
        return
    children: Any = ()
    if isinstance(value, (list, tuple)):
        children = value
    elif isinstance(value, dict):
        children = value.values()
    elif hasattr(value, "__dict__") and not callable(value):
        children = vars(value).values()
    for child in children:
        yield from tensors_with_a_batch(child, seen)


def cache_bytes(cache: Any) -> list[int]:
    return [sum(t.numel() * t.element_size() for t in tensors_with_a_batch(layer, set())) for layer in cache.layers]


@pytest.mark.parametrize(
    "name",
    ["llama", "gpt2", "gemma3", "mistral", "gpt-oss", "deepseek-v3", "falcon", "lfm2", "granitemoehybrid", "qwen3-moe"],
)
def test_cache_is_that_of_a_real_forward(
    name: str, tiny_model: Callable[[str], Path], loaded: Callable[[str, Precision], Any]
) -> None:
    import torch

    cost = cost_of(tiny_model(name), FullPrecision())
    model = loaded(name, FullPrecision())
    for batch in (1, 3):
        for length in LENGTHS:
            with torch.no_grad():
                output = model(torch.full((batch, length), 7), use_cache=True)

            foretold = cost.cache_bytes(Workload(context_length=length, batch_size=batch))

            assert list(foretold) == cache_bytes(output.past_key_values), f"{length} tokens, batch {batch}"


@pytest.mark.parametrize("name", ["llama", "gemma3", "lfm2"])
def test_cache_after_generating_is_that_of_the_full_context(
    name: str, tiny_model: Callable[[str], Path], loaded: Callable[[str, Precision], Any]
) -> None:
    import torch

    output = loaded(name, FullPrecision()).generate(
        torch.full((2, 20), 7),
        attention_mask=torch.ones(2, 20, dtype=torch.long),
        max_new_tokens=100,
        min_new_tokens=100,
        do_sample=False,
        return_dict_in_generate=True,
    )

    # The last token is never fed back.
    foretold = cost_of(tiny_model(name), FullPrecision()).cache_bytes(Workload(context_length=119, batch_size=2))
    assert list(foretold) == cache_bytes(output.past_key_values)


@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
@pytest.mark.parametrize("precision", [FullPrecision(dtype="float32"), Int8(), FourBit()])
def test_cache_of_other_precisions(name: str, precision: Precision, tiny_model: Callable[[str], Path]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = tiny_model(name)
    recipe = Recipe(model=str(folder), precision=precision, workload=Workload(context_length=100, batch_size=2))
    placement = place(recipe)
    # A model of its own: bitsandbytes repacks the weights in the first forward, which others count before.
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, placement.dtype),
        device_map={"": "cpu"},
        quantization_config=precision.to_config(placement.dtype),
    )
    with torch.no_grad():
        output = model(torch.full((2, 100), 7), use_cache=True)

    assert placement.kv_cache_bytes == sum(cache_bytes(output.past_key_values))


@pytest.mark.filterwarnings("ignore")  # of a library, about a config that is tiny
@pytest.mark.parametrize("model_type", [*STEPPING, *UNUSUAL])
def test_the_measurement_is_bounded_and_right_for_every_kind_of_forward(model_type: str, tmp_path: Path) -> None:
    import torch

    skeleton = tiny_skeleton(model_type, tmp_path)
    skeleton.meta_model(FullPrecision())
    start = time.thread_time()
    cost = measured(skeleton, FullPrecision())
    seconds = time.thread_time() - start

    assert cost is not None
    assert cost.is_exact
    assert seconds < 2  # the bound that it has is 1.2; before it had one, these took 6 to 190
    model = real_model(skeleton)
    for length in (1, 33, 200):
        with torch.no_grad():
            output = model(torch.full((1, length), 7), use_cache=True)
        found = (output.get(name) for name in ("past_key_values", "cache_params", "state"))
        cache = next((value for value in found if value is not None), None)
        if cache is None:  # recurrent_gemma keeps its states in its own modules
            cache = [value for module in model.modules() for name, value in vars(module).items() if name[0] != "_"]
        real = sum(t.numel() * t.element_size() for t in tensors_with_a_batch(cache, set()))
        assert sum(cost.cache_bytes(Workload(context_length=length))) == real, f"{length} tokens"


@pytest.mark.filterwarnings("ignore")
def test_what_is_no_line_is_said_to_be_inexact(tmp_path: Path) -> None:
    # Its layers gather tokens until a summary is made of them, so the cache shrinks now and then.
    cost = measured(tiny_skeleton("deepseek_v4", tmp_path), FullPrecision())
    assert cost is not None
    assert not cost.is_exact


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", ["deepseek_v3", "gemma2", "gpt2", "gptj", "llama4_text", "qwen3_next", "zaya"])
def test_a_layer_stands_in_for_others_without_a_difference(model_type: str, tmp_path: Path) -> None:
    skeleton = tiny_skeleton(model_type, tmp_path)
    module = skeleton.meta_model(FullPrecision()).module
    names = [block.name for block in skeleton.blocks]
    # As if no layer were of the same kind as another.
    apart = Rehearsal(module, names, skeleton.decoder_blocks, seconds=60)
    apart._stands_in = {}
    with apart:
        full = apart.run(129)
    together = Rehearsal(module, names, skeleton.decoder_blocks, seconds=60)
    with together:
        short = together.run(129)

    assert (short.cache, short.prefill, short.kept) == (full.cache, full.prefill, full.kept)
    assert short.operators < full.operators
    assert not any(block._forward_pre_hooks or "forward" in vars(block) for block in module.modules())


def test_activations_are_of_the_size_of_a_real_forward(
    tiny_model: Callable[[str], Path], loaded: Callable[[str, Precision], Any]
) -> None:
    """The estimate is for fused attention without scratch memory; real kernels differ by their scratch.

    Seen on the CPU: 0.97 to 1.05 of what is really live at the peak, so 0.8 to 1.25 leaves room for other versions of
    the kernels and still notices a term that is missing (the logits, the MLP's product, a second copy of the cache).
    DeepSeek is not among them: its value heads are narrower than its query heads, for which the CPU has no fused
    kernel, so there the matrix of all pairs comes on top.
    """
    import torch

    ratios = {}
    for name in ("llama", "gpt2", "gemma3", "mistral", "qwen3-moe", "lfm2", "falcon"):
        cost = cost_of(tiny_model(name), FullPrecision())
        for length, batch in ((64, 1), (200, 1), (400, 2)):
            workload = Workload(context_length=length, batch_size=batch)
            foretold = max(cost.activation_bytes(workload).values())
            foretold += sum(cost.kept_bytes(workload).values()) + sum(cost.cache_bytes(workload))
            real = peak_of_live_tensors(loaded(name, FullPrecision()), torch.full((batch, length), 7))
            ratios[name, length] = foretold / real

    assert all(0.8 < ratio < 1.25 for ratio in ratios.values()), "\n".join(map(str, ratios.items()))


def test_a_decode_step_takes_what_was_foretold(
    tiny_model: Callable[[str], Path], loaded: Callable[[str, Precision], Any]
) -> None:
    import torch

    ratios = {}
    for name in ("llama", "gpt2", "gemma3", "mistral", "qwen3-moe"):
        model = loaded(name, FullPrecision())
        cost = cost_of(tiny_model(name), FullPrecision())
        for length, batch in ((64, 1), (300, 2)):
            workload = Workload(context_length=length, batch_size=batch)
            foretold = max(cost.decode_bytes(workload).values()) + sum(cost.cache_bytes(workload))
            with torch.no_grad():
                cache = model(torch.full((batch, length - 2), 7), use_cache=True).past_key_values
                model(torch.full((batch, 1), 7), use_cache=True, past_key_values=cache)
            ratios[name, length] = foretold / peak_of_live_tensors(model, torch.full((batch, 1), 7), cache)

    assert all(0.8 < ratio < 1.25 for ratio in ratios.values()), "\n".join(map(str, ratios.items()))


def peak_of_live_tensors(model: Any, ids: Any, cache: Any = None) -> int:
    """Bytes of the storages that exist at once during a forward, the cache that it goes on from among them."""
    import weakref

    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    mine = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), ids)}
    live: dict[int, int] = {}
    peak = 0

    def keep(tensor: Any) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in live and storage.data_ptr() not in mine:
            live[key] = storage.nbytes()
            weakref.finalize(storage, live.pop, key)

    for tensor in tensors_with_a_batch(cache, set()):
        keep(tensor)

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal peak
            result = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    keep(tensor)
            peak = max(peak, sum(live.values()))
            return result

    with torch.no_grad(), Count():
        model(ids, use_cache=True, logits_to_keep=1, past_key_values=cache)
    return peak


def test_what_cannot_be_run_on_meta_is_unknown() -> None:
    import torch

    with torch.device("meta"):
        no_language_model = torch.nn.Sequential(torch.nn.Linear(4, 4))

    assert measure_cost(no_language_model, ["0"], []) is None


def test_a_forward_that_does_not_end_is_given_up() -> None:
    import torch

    class Endless(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(8, 4)

        def forward(self, input_ids: Any, **_: Any) -> Any:
            while True:
                self.embedding(input_ids)

    with torch.device("meta"):
        endless = Endless()
    start = time.thread_time()

    assert measure_cost(endless, ["embedding"], []) is None
    assert time.thread_time() - start < 2


def test_a_curve_goes_through_its_points_and_bends_between_them() -> None:
    curve = Curve(points=((10, 100), (20, 400), (40, 1600), (80, 1600)))

    assert [curve.at(tokens) for tokens in (10, 20, 40, 80)] == [100, 400, 1600, 1600]
    assert curve.at(15) == 225  # the first three are tokens squared
    assert curve.at(30) == 900
    assert curve.at(60) == 1600  # the parabola would overshoot
    assert curve.at(5) == 0  # the line through the first two, and never below nothing
    assert curve.at(100) == 1600
    assert Curve(points=((10, 100), (20, 400))).at(30) == 700
    assert curve.scaled(2).at(15) == 450


def test_a_cost_scales_with_the_bytes_of_an_element() -> None:
    curve = Curve(points=((10, 40), (30, 100)))
    cost = Cost(cache=((0, 2.0, 100), (40, 0.0, None)), prefill=(("a", curve),), kept=(("a", curve),))
    workload = Workload(context_length=20, batch_size=3)

    assert cost.cache_bytes(workload) == (120, 120)
    assert cost.cache_bytes(Workload(context_length=80)) == (100, 40)
    assert cost.activation_bytes(workload) == cost.kept_bytes(workload) == {"a": 3 * 70}
    assert cost.decode_bytes(workload) == {}
    assert cost.scaled(2).cache_bytes(workload) == (240, 240)
    assert cost.scaled(2).activation_bytes(workload) == {"a": 3 * 140}


@pytest.mark.parametrize(
    "options", [{"context_length": 0}, {"batch_size": -1}, {"batch_size": True}, {"context_length": 2.0}]
)
def test_a_workload_is_whole_numbers_of_at_least_one(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"^{name} is a whole number of at least 1, not"):
        Workload(**options)


def test_a_workload_lists_its_options() -> None:
    with pytest.raises(TypeError, match=r"no option 'context'.*context_length, batch_size"):
        Workload(context=3)
