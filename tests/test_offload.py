from __future__ import annotations

import dataclasses
import functools
import gc
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tiny_models import TINY_MODELS

import workbench as wb
from workbench.offload import WeightsChangedError, attach
from workbench.offload_pages import Chunk, MappedFile, PageReaders, is_supported
from workbench.session import in_worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.skipif(not is_supported(), reason="needs Linux 5.14 or newer")

DISK = {"strategy": "custom", "device_map": {"": "disk"}}
IDS = [[5, 6, 7, 8, 9, 10, 11, 12], [30, 31, 32, 33, 34, 35, 36, 37]]


def logits(session: wb.Session, steps: int = 3) -> Any:
    """Those of a prompt and of some tokens after it, so that the order wraps from the last layer to the first."""
    import torch

    def run() -> Any:
        ids = torch.tensor(IDS)
        found = []
        with torch.no_grad():
            cache = None
            for _ in range(1 + steps):
                out = session.model(input_ids=ids, past_key_values=cache, use_cache=True)
                cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
                found.append(out.logits[:, -1])
        return torch.stack(found)

    return in_worker(run)


def same(a: Any, b: Any) -> bool:
    import torch

    return bool(torch.equal(a, b)) and bool(a.isfinite().all())


def layers_on_disk(count: int, *, first: int = 0) -> dict[str, Any]:
    """A custom map with the decoder layers from one on on disk."""
    names = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    layers = {f"model.layers.{i}": "disk" if i >= first else "cpu" for i in range(count)}
    return {"strategy": "custom", "device_map": {**dict.fromkeys(names, "cpu"), **layers}}


def mapped_bytes(path: Path | str) -> int:
    """How much of a file this process has in its own memory."""
    mappings = Path("/proc/self/smaps").read_text().split("VmFlags:")
    rss = [re.search(r"^Rss: *(\d+) kB", mapping, re.MULTILINE) for mapping in mappings if str(path) in mapping]
    return sum(int(found[1]) * 1024 for found in rss if found)


def traces(folder: Path) -> list[str]:
    """What this process still holds of a folder's files, and the threads that read them."""
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    files = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = str(entry.readlink())
        except FileNotFoundError:
            continue
        files += [target] if str(folder) in target else []
    threads = [t.name for t in threading.enumerate() if t.name.startswith("workbench-pages")]
    return maps + files + threads


@pytest.fixture(scope="session")
def wide_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 layers of 4.5 MiB: hidden 512, so that pages, budgets and chunks matter. No tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide") / "llama"
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=12,
        num_attention_heads=8,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def own_llama(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy whose files may be damaged, and that no other test has mapped."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "llama"))


def recipe_of(folder: Path, **options: Any) -> wb.Recipe:
    return wb.Recipe(model=str(folder), workload=wb.Workload(context_length=64), **options)


def load(folder: Path, offload: Any = "workbench", **options: Any) -> wb.Session:
    return wb.load(recipe_of(folder, **options), offload=offload)


# --- the same results -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY_MODELS)
def test_logits_are_those_of_accelerate(name: str, tiny_model: Callable[[str], Path]) -> None:
    theirs = load(tiny_model(name), "accelerate", **DISK)
    ours = load(tiny_model(name), **DISK)
    try:
        assert ours.load_report.matches, ours.load_report.lines
        assert ours._offload is not None, ours.load_report.lines
        assert theirs._offload is None
        assert not any(hasattr(module, "_hf_hook") for module in ours.model.modules())
        assert same(logits(ours), logits(theirs))
    finally:
        ours.unload()
        theirs.unload()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"precision": wb.FullPrecision(dtype="float32")}),
        ("gemma3", {"precision": wb.FullPrecision(dtype="float16")}),
        ("deepseek-v3", {"offload_buffers": True}),
        ("llama", layers_on_disk(4, first=2)),
        ("llama", {"strategy": "auto", "max_memory": {"cpu": 400_000, "disk": "1GiB"}}),
    ],
    ids=["float32", "float16", "buffers", "half", "budget"],
)
def test_logits_are_those_of_accelerate_with(
    name: str, options: dict[str, Any], tiny_model: Callable[[str], Path]
) -> None:
    options = {**DISK, **options} if "strategy" not in options else options
    theirs = load(tiny_model(name), "accelerate", **options)
    ours = load(tiny_model(name), **options)
    try:
        assert ours._offload is not None, ours.load_report.lines
        assert any(line.startswith("Offload: ") for line in ours.load_report.lines)
        assert same(logits(ours), logits(theirs))
    finally:
        ours.unload()
        theirs.unload()


def test_weights_are_views_of_the_checkpoint_itself(tiny_model: Callable[[str], Path]) -> None:
    folder = tiny_model("llama-tied")
    session = load(folder, **DISK)
    try:
        model, file = session.model, str(folder / "model.safetensors")
        assert model.lm_head.weight is model.model.embed_tokens.weight
        mappings = [
            [int(at, 16) for at in line.split()[0].split("-")]
            for line in Path("/proc/self/maps").read_text().splitlines()
            if file in line
        ]
        for name, parameter in model.named_parameters():
            assert any(low <= parameter.data_ptr() < high for low, high in mappings), name
        assert list(Path(session._offload_folder.name).iterdir()) == []  # no second copy
    finally:
        session.unload()


def test_another_dtype_is_stored_once(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    own = {"offload_folder": str(tmp_path), **DISK}
    session = load(tiny_model("llama-tied"), precision=wb.FullPrecision(dtype="float32"), **own)
    try:
        assert "stored again" in session.load_report.lines[-1]
        stored = sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
        assert stored >= session._offload._files.converted_bytes == session.load_report.measured_bytes["disk"]
    finally:
        session.unload()
    assert not list(tmp_path.rglob("*.safetensors"))  # in a folder of the user's own


def test_a_disk_without_room_for_copies_leaves_it_to_accelerate(tiny_model: Callable[[str], Path]) -> None:
    options = {"precision": wb.FullPrecision(dtype="float32"), **DISK}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # as if the disk was full after so many bytes
    try:
        session = load(tiny_model("llama"), **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    theirs = load(tiny_model("llama"), "accelerate", **options)
    try:
        assert session._offload is None
        assert "accelerate's hooks" in session.load_report.lines[-1]
        assert "the disk has no room for a copy" in session.load_report.lines[-1]
        assert same(logits(session), logits(theirs))
    finally:
        session.unload()
        theirs.unload()


def test_quantized_weights_are_left_to_accelerate(tiny_llama: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    placement = wb.place(recipe_of(tiny_llama, **DISK))
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, device_map={"": "disk"}, dtype=torch.bfloat16)
    projection = model.model.layers[0].self_attn.q_proj

    class Packed(torch.nn.Parameter):
        pass

    projection._parameters["weight"] = Packed(projection.weight)
    offload, lines = attach(model, placement, None)
    assert offload is None
    assert "layers.0.self_attn.q_proj.weight is no plain tensor but a Packed" in lines[0]
    assert hasattr(projection, "_hf_hook")


def test_nothing_is_done_where_nothing_waits(tiny_llama: Path) -> None:
    session = load(tiny_llama)
    assert session._offload is None
    assert not any(line.startswith("Offload") for line in session.load_report.lines)
    session.unload()
    with pytest.raises(ValueError, match="offload is 'workbench' or 'accelerate'"):
        load(tiny_llama, "fast")


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def wide_logits(wide_llama: Path) -> Any:
    session = load(wide_llama, "accelerate", **layers_on_disk(12))
    found = logits(session)
    session.unload()
    return found


@pytest.mark.parametrize(("room_mib", "drops"), [(9, False), (9, True), (24, True), (40, False)])
def test_memory_stays_within_the_budget(wide_llama: Path, wide_logits: Any, room_mib: int, drops: bool) -> None:  # noqa: FBT001
    budgets = {"cpu": f"{room_mib + 2}MiB", "disk": "1GiB"}
    session = load(wide_llama, "accelerate", max_memory=budgets, **layers_on_disk(12))
    file = wide_llama / "model.safetensors"
    offload, _ = attach(session.model, session.placement, None, drop_behind=drops)
    assert offload is not None
    seen: list[int] = []

    def look(*_: Any) -> None:
        seen.append(mapped_bytes(file))

    try:
        memory = session.placement.memory["cpu"]
        assert offload.room_bytes <= max(memory.limit_bytes - memory.weight_bytes, memory.reserved_bytes)
        assert offload.streamed_bytes > 0
        before = mapped_bytes(file)  # what is on the CPU is mapped from the same file
        for layer in session.model.model.layers:
            layer.self_attn.o_proj.register_forward_hook(look)
            layer.mlp.down_proj.register_forward_hook(look)
        assert same(logits(session), wide_logits)
        assert len(seen) == 4 * 24
        resident = memory.weight_bytes + 2**20  # the embedding and the head come in while it runs
        assert max(seen) - before <= offload.room_bytes + resident
        assert max(seen) > offload.kept_bytes
    finally:
        offload.close()
        session.unload()


def test_what_fits_stays(wide_llama: Path) -> None:
    session = load(wide_llama, **layers_on_disk(12))
    try:
        logits(session)
        offload = session._offload
        assert offload.streamed_bytes == 0
        assert mapped_bytes(wide_llama / "model.safetensors") >= session.load_report.measured_bytes["disk"]
        assert "all of them stay in memory" in session.load_report.lines[-1]
    finally:
        session.unload()


def test_pages_that_the_system_took_are_read_again(wide_llama: Path) -> None:
    session = load(wide_llama, **layers_on_disk(12))
    try:
        expected = logits(session)
        offload = session._offload
        for file in offload._files.mapped.values():
            os.sync()
            file.release(0, file.size_bytes, drop=True)
        assert same(logits(session), expected)
        places = [place for unit in offload._order for place in unit.dense]
        assert all(file.is_resident(start, end) for file, start, end in places)
    finally:
        session.unload()


def test_only_the_experts_that_are_hit_are_read(tmp_path: Path) -> None:
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=16,
        num_experts_per_tok=2,
        max_position_embeddings=128,
        dtype="bfloat16",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "mixtral")
    session = load(tmp_path / "mixtral", **DISK)
    theirs = load(tmp_path / "mixtral", "accelerate", **DISK)
    try:
        offload = session._offload
        assert offload is not None, session.load_report.lines
        hit: dict[str, set[int]] = {}

        def note(name: str, _module: Any, args: Any, kwargs: Any) -> None:
            router = next(v for v in (*args, *kwargs.values()) if not v.is_floating_point())
            hit.setdefault(name, set()).update(router.flatten().tolist())

        for name, module in session.model.named_modules():
            if name.endswith(".experts"):
                module.register_forward_pre_hook(functools.partial(note, name), with_kwargs=True)
        os.sync()
        for file in offload._files.mapped.values():
            file.release(0, file.size_bytes, drop=True)
        probe = next(iter(offload._files.mapped.values()))
        if probe.is_resident(0, probe.size_bytes):
            pytest.skip("this file system keeps its pages in memory")
        ids = torch.tensor([[5]])
        with torch.no_grad():
            ours_out = in_worker(lambda: session.model(ids).logits)
            assert same(ours_out, in_worker(lambda: theirs.model(ids).logits))
        for name in ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts"):
            assert len(hit[name]) == 2
            unit = next(u for u in offload._units if name.startswith(u.name))
            assert len({first for first, _ in unit.chosen}) == 2 * 2  # two tensors each
            read = sum(
                file.is_resident(first, first + 4096)
                for file, start, end in unit.sparse
                for first in range(start - start % 4096 + 4096, end - 4096, 4096)
            )
            whole = sum(end - start for _, start, end in unit.sparse) / 4096
            assert read < whole * 0.2  # 2 of 16, and the pages at the edges
    finally:
        session.unload()
        theirs.unload()


@pytest.mark.parametrize("budgets", [None, {"cpu": "200KiB", "disk": "1GiB"}])
def test_experts_that_are_modules_are_read_when_they_are_called(
    tiny_model: Callable[[str], Path], tmp_path: Path, budgets: dict[Any, Any] | None
) -> None:
    import torch
    from transformers import AutoConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaMLP

    class Mixture(torch.nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.experts = torch.nn.ModuleList(LlamaMLP(config) for _ in range(3))

        def forward(self, hidden: Any) -> Any:
            return self.experts[2](hidden) + self.experts[0](hidden)

    class Mixed(LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            for layer in self.model.layers:
                layer.mlp = Mixture(config)

    plain = tiny_model("llama")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Mixed(AutoConfig.from_pretrained(plain)).to(torch.bfloat16).save_pretrained(tmp_path)
    placement = wb.place(recipe_of(plain, max_memory=budgets, **layers_on_disk(4)))
    options = {"device_map": placement.device_map, "dtype": torch.bfloat16, "offload_folder": tmp_path / "none"}
    theirs, ours = (Mixed.from_pretrained(tmp_path, **options) for _ in range(2))
    offload, lines = attach(ours, placement, None)
    assert offload is not None, lines
    ids = torch.tensor(IDS)
    try:
        with torch.no_grad():
            for _ in range(2):
                assert in_worker(lambda: same(ours(ids).logits, theirs(ids).logits))
        experts = {unit.name: unit for unit in offload._units if unit.on_demand}
        assert len(experts) == 4 * 3
        assert not experts["model.layers.0.mlp.experts.1"].queued
        assert bool(experts["model.layers.0.mlp.experts.2"].queued) is (budgets is None)  # let go with its layer
        assert experts["model.layers.3.mlp.experts.2"].queued  # that was the last
    finally:
        offload.close()


# --- what can go wrong ------------------------------------------------------------------------------------------------


def test_a_removed_or_replaced_file_goes_on(own_llama: Path) -> None:
    session = load(own_llama, **DISK)
    try:
        expected = logits(session)
        file = own_llama / "model.safetensors"
        file.unlink()
        file.write_bytes(b"something else")
        assert same(logits(session), expected)
    finally:
        session.unload()


@pytest.mark.parametrize("damage", ["cut", "written"])
def test_a_changed_file_is_an_error_and_no_crash(own_llama: Path, damage: str) -> None:
    session = load(own_llama, **DISK)
    try:
        logits(session)
        file = own_llama / "model.safetensors"
        if damage == "cut":
            os.truncate(file, 4096)
        else:
            with file.open("r+b") as opened:
                opened.seek(100)
                opened.write(b"x")
            os.utime(file, ns=(0, 0))  # a clock that is too coarse to tell
        with pytest.raises(WeightsChangedError, match="unload the model, restore the file"):
            session.generate("hello", max_new_tokens=4)
    finally:
        session.unload()
    assert traces(own_llama) == []


def test_a_page_that_cannot_be_read_is_an_error(own_llama: Path) -> None:
    path = own_llama / "model.safetensors"
    file, readers = MappedFile(str(path)), PageReaders()

    class Owner:
        from_disk = False

    try:
        os.truncate(path, 4096)
        owner = Owner()
        chunks = [Chunk(owner=owner, file=file, start=at, end=at + 4096) for at in (0, 8192, 16384)]
        readers.put(chunks, front=False)
        with pytest.raises(OSError, match=str(path)):
            readers.wait(owner)
    finally:
        readers.close()
        file.close()
    assert not [t for t in threading.enumerate() if t.name == "workbench-pages"]


def test_no_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"\x10\0\0\0\0\0\0\0not what it says, but some text")
    with pytest.raises(OSError, match="is no safetensors file"):
        MappedFile(str(path))
    assert traces(tmp_path) == []


def test_an_error_in_the_middle_leaves_it_usable(wide_llama: Path) -> None:
    recipe = {"max_memory": {"cpu": "30MiB", "disk": "1GiB"}, **layers_on_disk(12)}
    session = load(wide_llama, **recipe)
    try:
        expected = logits(session)

        def fail(*_: Any) -> None:
            raise RuntimeError("in the middle")

        handle = session.model.model.layers[7].mlp.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            logits(session)
        handle.remove()
        assert same(logits(session), expected)
    finally:
        session.unload()
    assert traces(wide_llama) == []


def test_layers_that_are_skipped_or_swapped(wide_llama: Path) -> None:
    recipe = {"max_memory": {"cpu": "30MiB", "disk": "1GiB"}, **layers_on_disk(12)}
    ours, theirs = load(wide_llama, **recipe), load(wide_llama, "accelerate", **recipe)
    try:
        for session in (ours, theirs):
            layers = list(session.model.model.layers)
            session.model.model.layers = type(session.model.model.layers)(layers[:3] + layers[:4:-2])
            for index, layer in enumerate(session.model.model.layers):
                layer.self_attn.layer_idx = index
            session.model.config.num_hidden_layers = len(session.model.model.layers)
        assert same(logits(ours, steps=5), logits(theirs, steps=5))
    finally:
        ours.unload()
        theirs.unload()


def test_two_sessions_at_once(wide_llama: Path, own_llama: Path) -> None:
    first = load(wide_llama, max_memory={"cpu": "30MiB", "disk": "1GiB"}, **layers_on_disk(12))
    second = load(wide_llama, **layers_on_disk(12, first=6))
    third = load(own_llama, **DISK)
    expected = [logits(session) for session in (first, second, third)]
    assert same(expected[0], expected[1])
    for _ in range(2):
        assert same(logits(first), expected[0])
        stream = third.stream("hello", max_new_tokens=4)
        next(stream)
        second.unload() if second.model else None
        list(stream)
        assert same(logits(third), expected[2])
    first.unload()
    third.unload()
    assert traces(wide_llama) + traces(own_llama) == []


def test_unloading_leaves_nothing(wide_llama: Path) -> None:
    session = load(wide_llama, max_memory={"cpu": "30MiB", "disk": "1GiB"}, **layers_on_disk(12))
    folder = Path(session._offload_folder.name)
    logits(session)
    assert traces(wide_llama)
    session.unload()
    session.unload()
    assert traces(wide_llama) == []
    assert not folder.exists()


def test_a_model_that_outlives_its_session_works(own_llama: Path) -> None:
    session = load(own_llama, **DISK)
    expected = logits(session)
    model, session_model = session.model, session
    session.unload()
    session_model.model = model
    assert same(logits(session_model), expected)
    session_model.model = model = None
    gc.collect()
    assert traces(own_llama) == []


def test_a_session_that_is_collected_while_it_streams(own_llama: Path) -> None:
    session = load(own_llama, **DISK)
    stream = session.stream("hello", max_new_tokens=1500)
    next(stream)
    del session
    stream.close()
    del stream
    in_worker(lambda: None)  # the token that was being computed
    gc.collect()
    assert traces(own_llama) == []


def test_interrupts_at_many_moments(wide_llama: Path, tiny_llama: Path) -> None:
    shutil.copytree(
        tiny_llama, wide_llama, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors", "*.json")
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama / name, wide_llama / name)
    session = load(wide_llama, max_memory={"cpu": "30MiB", "disk": "1GiB"}, **layers_on_disk(12))
    try:
        expected = session.generate("hello", max_new_tokens=4)
        for moment in range(0, 50, 3):
            calls = iter(range(1000))

            def interrupt(*_: Any, calls: Iterator[int] = calls, moment: int = moment) -> None:
                if next(calls) == moment:
                    signal.raise_signal(signal.SIGINT)

            handles = [layer.register_forward_pre_hook(interrupt) for layer in session.model.model.layers]
            with pytest.raises(KeyboardInterrupt):
                session.generate("hello", max_new_tokens=400)
            for handle in handles:
                handle.remove()
        assert session.generate("hello", max_new_tokens=4) == expected
    finally:
        session.unload()
    assert traces(wide_llama) == []


@pytest.mark.parametrize("end", ["", "import os, signal; os.kill(os.getpid(), signal.SIGINT)"])
def test_a_program_that_ends_while_it_reads(wide_llama: Path, end: str) -> None:
    script = f"""
import workbench as wb, torch
recipe = wb.Recipe(
    model={str(wide_llama)!r},
    max_memory={{"cpu": "30MiB", "disk": "1GiB"}},
    workload=wb.Workload(context_length=64),
    **{layers_on_disk(12)!r},
)
session = wb.load(recipe)
with torch.no_grad():
    session.model(torch.tensor([[5, 6]]))
chunks = [c for u in session._offload._units for c in u.chunks] * 2000
session._offload._readers.put(chunks, front=False)
print("reads on")
{end}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert "reads on" in done.stdout, done.stderr
    assert done.returncode in ((0,) if not end else (-signal.SIGINT, 130, 1)), done.stderr
    assert "Fatal" not in done.stderr


@pytest.mark.parametrize("home", ["cpu", "disk"])
def test_layers_that_wait_under_a_gpu_are_saved(
    tiny_llama: Path, tmp_path: Path, home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What our GPU offload does to a model, with the CPU in the place of the GPU: nothing is computed."""
    import torch
    from accelerate import cpu_offload
    from accelerate.utils import OffloadedWeightsLoader
    from safetensors.torch import load_file

    from workbench import offload_gpu
    from workbench.offload_files import WeightFiles, find_waiting, hooks_of

    session = load(tiny_llama, "accelerate", **(DISK if home == "disk" else {}))
    if home == "cpu":
        for layer in session.model.model.layers:
            weights = OffloadedWeightsLoader(state_dict=layer.state_dict())  # as it is under a GPU
            cpu_offload(layer, execution_device=torch.device("cpu"), state_dict=weights)
    placement = wb.place(recipe_of(tiny_llama, **DISK))
    for module in session.model.modules():
        for hook in hooks_of(module):
            hook.execution_device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    tensors, files = find_waiting(session.model), WeightFiles(None)
    mapped = files.map([t for t in tensors if t.in_ram is None])
    placement = dataclasses.replace(placement, memory={torch.device("cuda", 0): placement.memory["disk"]})
    session._offload = offload_gpu.attach_to_gpu(session.model, tensors, mapped, files, placement)
    monkeypatch.undo()
    assert session.model.model.layers[1].mlp.up_proj.weight.is_meta
    saved = load_file(session.save(tmp_path / "saved") / "model.safetensors")
    original = load_file(tiny_llama / "model.safetensors")
    assert saved.keys() == original.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in original.items())
    session.unload()


@pytest.mark.gpu
@pytest.mark.parametrize("home", ["cpu", "disk"])
def test_layers_under_a_gpu(wide_llama: Path, tmp_path: Path, home: str) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    options = layers_on_disk(12)
    options["device_map"] = {n: home if d == "disk" else 0 for n, d in options["device_map"].items()}
    ours, theirs = load(wide_llama, **options), load(wide_llama, "accelerate", **options)
    try:
        assert ours._offload is not None, ours.load_report.lines
        assert same(logits(ours).cpu(), logits(theirs).cpu())
        again = load(ours.save(tmp_path / "saved"))
        assert same(logits(ours).cpu(), logits(again).cpu())
        again.unload()
    finally:
        ours.unload()
        theirs.unload()
    assert traces(wide_llama) == []
