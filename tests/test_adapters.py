"""LoRA adapters: trained, saved, loaded, switched, merged and removed, on bases in every precision."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hub_server import HubServer

import workbench as wb
from workbench.adapters import base_note, read_adapter
from workbench.four_bit import unpack
from workbench.sizes import measure_weights
from workbench.training import batch_of, encode_examples

if TYPE_CHECKING:
    from pathlib import Path

SMALL = wb.Workload(context_length=128)
IDS = (torch.arange(40) * 7 % 500)[None]
TEXTS = ["The quick brown fox jumps over the lazy dog.", ("What is this?", "A test."), ("And that?", "Another one.")]
BASES = {
    "full": wb.FullPrecision(),
    "float16": wb.FullPrecision(dtype="float16"),
    "int8": wb.Int8(),
    "nf4": wb.FourBit(),
}


def logits(session: wb.Session) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = session.model(IDS).logits.clone()
    return found


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.fixture(scope="module")
def adapter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of rank 4 on all 14 linear modules of the tiny Llama, strong enough to be seen."""
    session = wb.load(wb.Recipe(model=str(tiny_llama), workload=SMALL))
    folder = tmp_path_factory.mktemp("adapters") / "french"
    session.train_adapter(TEXTS, name="french", r=4, alpha=64, steps=20, learning_rate=0.02, folder=folder)
    session.unload()
    return folder


@pytest.mark.parametrize("name", BASES)
def test_loaded_switched_and_removed(name: str, tiny_llama: Path, adapter: Path, tmp_path: Path, load: Any) -> None:
    session = load(tiny_llama, precision=BASES[name])
    base, bytes_before = logits(session), measure_weights(session.model)
    info = session.adapters.load(adapter)
    # In a layer q and o are 64 x 64, k and v 64 x 32, gate, up and down 64 x 128: rank 4 times the sums of the sides,
    # in two layers, four bytes each.
    assert info.size_bytes == 4 * 4 * 2 * (2 * 128 + 2 * 96 + 3 * 192)
    assert (info.name, info.r, info.alpha, len(info.modules)) == ("french", 4, 64.0, 14)
    assert session.adapters.active == "french"
    spoken = logits(session)
    assert distance(spoken, base) > 0.05
    assert measure_weights(session.model)["cpu"] == bytes_before["cpu"] + info.size_bytes
    assert session.placement.total_bytes == session.load_report.measured_bytes["cpu"] + info.size_bytes

    session.adapters.load(adapter, name="again")
    assert [a.name for a in session.adapters.list()] == ["french", "again"]
    assert torch.equal(logits(session), spoken)
    session.adapters.use(None)
    assert torch.equal(logits(session), base)
    session.adapters.use("french")
    with session.adapters.without():
        assert torch.equal(logits(session), base)
    assert torch.equal(logits(session), spoken)
    session.adapters.remove("french")
    assert session.recipe.adapters == (str(adapter),)
    assert session.placement.total_bytes == session.load_report.measured_bytes["cpu"] + info.size_bytes
    copy = session.adapters.save("again", tmp_path / "copy")
    assert session.recipe.adapters == (str(copy),)
    assert session.adapters.active is None
    assert torch.equal(logits(session), base)
    session.adapters.use("again")
    assert torch.equal(logits(session), spoken)
    session.adapters.remove("again")
    assert measure_weights(session.model) == bytes_before
    assert torch.equal(logits(session), base)
    assert session.recipe.adapters == ()
    assert not any("lora" in key for key, _ in session.model.named_modules())


@pytest.mark.parametrize("kind", [("full", 0.02), ("int8", 0.05), ("nf4", 0.25)])
def test_merged_and_saved(kind: tuple[str, float], tiny_llama: Path, adapter: Path, tmp_path: Path, load: Any) -> None:
    from safetensors.torch import load_file

    name, most = kind
    session = load(tiny_llama, precision=BASES[name])
    base = logits(session)
    session.adapters.load(adapter)
    spoken = logits(session)
    with pytest.raises(ValueError, match="Merge or remove the adapter french first"):
        session.save(tmp_path / "whole")
    with pytest.raises(ValueError, match="Merge or remove the adapter french first"):
        session.push_to_hub("tiny")
    said = session.adapters.merge("french")
    assert "french is part of 14 modules now." in said
    assert ("rounded" in said) == (name != "full")
    merged = logits(session)
    assert distance(merged, spoken) < most < distance(base, spoken)
    assert session.adapters.list() == ()
    again = load(session.save(tmp_path / "whole"))
    assert torch.equal(logits(again), merged)
    pushed: list[Any] = []

    def take(source: Any, *_: Any, **__: Any) -> str:
        pushed.append(load_file(f"{source.location}/model.safetensors"))
        return "there"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("workbench.upload.push_folder", take)
        assert session.push_to_hub("tiny") == "there"
    saved = load_file(tmp_path / "whole" / "model.safetensors")
    assert saved.keys() == pushed[0].keys()
    assert all(torch.equal(tensor, pushed[0][key]) for key, tensor in saved.items())


def test_in_the_preview_and_in_the_exported_program(tiny_llama: Path, adapter: Path, load: Any, tmp_path: Path) -> None:
    recipe = wb.Recipe(model=str(tiny_llama), workload=SMALL, precision=wb.FourBit())
    alike = shutil.copytree(adapter, tmp_path / "other" / adapter.name)
    chosen = recipe.with_(adapters=(str(adapter), str(alike)))
    assert wb.Recipe.from_json(chosen.to_json()) == chosen
    plain, placement = wb.place(recipe), wb.place(chosen)
    size = 2 * read_adapter(adapter).size_bytes
    assert placement.total_bytes == plain.total_bytes + size
    assert placement.memory["cpu"].weight_bytes == plain.memory["cpu"].weight_bytes + size
    grown = [b.bytes_after - a.bytes_after for a, b in zip(plain.layers, placement.layers, strict=True)]
    assert [size for size in grown if size] == [size // 2, size // 2]
    assert plain.device_map == placement.device_map

    # "packed" keeps room for them: all but the last byte of the model and its adapters.
    card = wb.Machine.preset("RTX 4090")
    full = chosen.with_(precision=wb.FullPrecision(), strategy="packed")
    budgets = {0: wb.place(full, machine=card).total_bytes - 1, "cpu": "1GiB"}
    short = wb.place(full.with_(max_memory=budgets), machine=card)
    assert short.verdict == "offloads", short.summary

    session = load(tiny_llama, precision=wb.FourBit(), adapters=chosen.adapters)
    assert session.load_report.matches, session.load_report.lines
    assert [a.name for a in session.adapters.list()] == ["french", "french_2"]
    assert session.adapters.active == "french_2"
    code = chosen.to_python() + "\nprint(model.active_adapter, model(inputs['input_ids']).logits.float().norm().item())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    name, norm = done.stdout.split()[-2:]
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    ids = session.tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert (name, float(norm)) == (
            "french_2",
            pytest.approx(float(session.model(ids).logits.float().norm()), rel=1e-3),
        )


def test_on_a_gptq_base(tiny_llama: Path, adapter: Path, tmp_path: Path, load: Any) -> None:
    text = wb.CalibrationText(samples=2, sequence_length=32)
    quantized = wb.Recipe(model=str(tiny_llama), precision=wb.GPTQ(group_size=32), workload=SMALL)
    wb.quantize(quantized, tmp_path / "gptq", calibration=text, evaluation=None)
    session = load(tmp_path / "gptq", adapters=(str(adapter),))
    assert session.load_report.matches, session.load_report.lines
    spoken = logits(session)
    with session.adapters.without():
        base = logits(session)
    assert distance(spoken, base) > 0.05
    with pytest.raises(ValueError, match="Weights in GPTQ 4-bit, groups of 32 cannot take an adapter in"):
        session.adapters.merge("french")
    session.adapters.remove("french")
    assert torch.equal(logits(session), base)
    inference_only = load(tmp_path / "gptq", precision=wb.GPTQ(group_size=32, backend="torch_int8"))
    with pytest.raises(ValueError, match="passes no gradients on: load the model again with backend='torch'"):
        inference_only.plan_training(TEXTS)


ON_THE_HUB = """
import json, sys
import workbench as wb
recipe = wb.Recipe(model=sys.argv[1], adapters=("org/french",), workload=wb.Workload(context_length=128))
sizes = [wb.place(recipe.with_(max_memory={"cpu": budget})).total_bytes for budget in ("4GiB", "3GiB")]
print("placed", flush=True)
sys.stdin.readline()  # what was asked for until now is looked at
session = wb.load(recipe)
said = []
for name in ("org/nothing", "org/pickle"):
    try:
        wb.read_adapter(name)
    except ValueError as error:
        said.append(str(error))
print(json.dumps([sizes, session.adapters.active, session.load_report.matches, said]))
"""


def test_on_the_hub_only_the_header_travels_before_the_load(tiny_llama: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "pickle").mkdir()
    shutil.copy(adapter / "adapter_config.json", tmp_path / "pickle")
    with HubServer(repos={"org/french": adapter, "org/pickle": tmp_path / "pickle"}) as hub:
        asked = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", ON_THE_HUB, str(tiny_llama)],
            env=hub.env(tmp_path / "cache"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert asked.stdout
        assert asked.stdout.readline() == "placed\n"
        before = list(hub.requests)
        out, _ = asked.communicate("go\n", timeout=120)
        after = list(hub.requests)[len(before) :]
    weights = [r for r in before if r.path.endswith(".safetensors") and r.sent_bytes]
    assert [request.range is None for request in weights] == [False]  # once, for both budgets
    assert any(r.path.endswith(".safetensors") and r.sent_bytes and r.range is None for r in after)
    sizes, active, matches, said = json.loads(out.splitlines()[-1])
    with_it = wb.place(wb.Recipe(model=str(tiny_llama), adapters=(str(adapter),), workload=SMALL)).total_bytes
    assert sizes == [with_it, with_it]
    assert (active, matches) == ("org_french", True)
    assert said[0].startswith("The Hub has no adapter org/nothing")
    assert "org/pickle lacks adapter_config.json or adapter_model.safetensors (pickles" in said[1]


def test_another_base_is_refused_with_both_names(adapter: Path, tiny_model: Any) -> None:
    other = tiny_model("llama")  # of four layers; its matrices are alike
    assert wb.place(wb.Recipe(model=str(other), adapters=(str(adapter),), workload=SMALL)).verdict == "fits"
    note = base_note(read_adapter(adapter), wb.read_skeleton(str(other)))
    assert note == "The adapter french was trained on tiny-llama; it fits llama, but what it learnt may not."
    other = tiny_model("llama-tied")
    with pytest.raises(ValueError, match=r"on tiny-llama, and this model is llama-tied: .*200 x 64 in it, not"):
        wb.place(wb.Recipe(model=str(other), adapters=(str(adapter),), workload=SMALL))
    with pytest.raises(ValueError, match=r"and this model is gpt2: model.layers.0.* is no linear module of it"):
        wb.place(wb.Recipe(model=str(tiny_model("gpt2")), adapters=(str(adapter),), workload=SMALL))


def broken(adapter: Path, folder: Path, how: str) -> Path:
    shutil.copytree(adapter, folder)
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if how == "no config":
        config.unlink()
    elif how == "bad config":
        config.write_text("{", encoding="utf-8")
    elif how == "other kind":
        config.write_text(json.dumps({"peft_type": "IA3"}), encoding="utf-8")
    elif how == "cut short":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "no weights":
        weights.rename(weights.with_suffix(".bin"))
    else:
        from safetensors.torch import load_file, save_file

        tensors = load_file(weights)
        del tensors[next(name for name in tensors if "lora_B" in name)]
        save_file(tensors, weights)
    return folder


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("no config", "holds no adapter_config.json: name the folder"),
        ("bad config", "adapter_config.json of .* is damaged"),
        ("other kind", "is an adapter of type IA3: Workbench loads LoRA"),
        ("cut short", "adapter_model.safetensors is damaged or cut short"),
        ("no weights", r"holds no adapter_model.safetensors \(pickles, which can run code, are not read\)"),
        ("half", "lacks one of its two matrices"),
    ],
)
def test_corrupt_adapters(adapter: Path, tmp_path: Path, how: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        read_adapter(broken(adapter, tmp_path / "broken", how))


def test_bad_input(tiny_llama: Path, adapter: Path, load: Any, tmp_path: Path) -> None:
    session = load(tiny_llama)
    for call, sentence in (
        (lambda: session.adapters.use("x"), "There is no adapter 'x'; loaded: none"),
        (lambda: session.adapters.load("nowhere"), "There is no folder nowhere, and it is no Hub id"),
        (lambda: session.adapters.load(adapter, name="a.b"), "name is letters, digits and _, not 'a.b'"),
        (lambda: session.train_adapter([]), "texts is a list of texts, or of"),
        (lambda: session.train_adapter([7]), r"Each of texts is a text or a \(question, answer\) pair, not '7'"),
        (lambda: session.train_adapter(TEXTS, r=0), "r is a whole number of at least 1, not 0"),
        (lambda: session.train_adapter(TEXTS, steps=True), "steps is a whole number"),
        (lambda: session.train_adapter(TEXTS, learning_rate=-1), "learning_rate is a number above 0"),
        (lambda: session.train_adapter(TEXTS, dropout=1), "dropout is a number from 0 to below 1"),
        (
            lambda: session.train_adapter(TEXTS, layers=(2,)),
            r"layers are numbers of decoder layers, 0 to 1, not \(2,\)",
        ),
        (
            lambda: session.train_adapter(TEXTS, target_modules=("q_prj",)),
            "no linear module 'q_prj' .*close are 'q_proj'",
        ),
        (lambda: session.train_adapter(TEXTS, max_length=2), "Nothing is left to learn of .*: raise max_length"),
        (lambda: session.train_adapter(TEXTS, folder=adapter), "french exists: name a new folder, or say overwrite"),
        (lambda: session.train_adapter(TEXTS, folder=tiny_llama, overwrite=True), "is the model itself: name another"),
        (lambda: session.train_adapter(TEXTS, batch_size=10**5), "Training takes .* cpu has .*gradient_checkpointing"),
    ):
        with pytest.raises(ValueError, match=sentence):
            call()
    with pytest.raises(TypeError, match="Did you mean 'steps'"):
        session.train_adapter(TEXTS, stepz=1)
    with pytest.raises(ValueError, match="adapters is a sequence of folders"):
        wb.Recipe(adapters="x")
    session.adapters.load(adapter)
    with pytest.raises(ValueError, match="is the model itself: name another"):
        session.adapters.save("french", tiny_llama, overwrite=True)
    with pytest.raises(ValueError, match="There is an adapter 'french' already"):
        session.adapters.load(adapter)
    with pytest.raises(ValueError, match="There is an adapter 'french' already"):
        session.train_adapter(TEXTS, name="french")
    half = {"model": str(tiny_llama), "strategy": "custom", "device_map": {"": "disk"}, "workload": SMALL}
    with pytest.raises(ValueError, match="Adapters need every layer where it runs"):
        wb.load(wb.Recipe(**half, adapters=(str(adapter),)))


def test_cancelled_and_resumed_is_as_if_it_had_gone_on(tiny_llama: Path, tmp_path: Path, load: Any) -> None:
    options: dict[str, Any] = {"steps": 12, "batch_size": 2, "dropout": 0.1, "learning_rate": 0.01}
    session = load(tiny_llama, precision=wb.FourBit())
    base = logits(session)
    whole = session.train_adapter(TEXTS, name="whole", **options)
    spoken = logits(session)
    session.adapters.remove("whole")
    cancel = threading.Event()
    seen: list[Any] = []

    def stop(step: Any) -> None:
        seen.append(step)
        if step.done == 5:
            cancel.set()

    folder = tmp_path / "made"
    with pytest.raises(wb.Cancelled):
        session.train_adapter(TEXTS, name="cut", folder=folder, progress=stop, cancel=cancel, **options)
    assert not folder.exists()
    assert [step.done for step in seen] == [0, 1, 2, 3, 4, 5]
    assert session.adapters.list() == ()
    assert torch.equal(logits(session), base)
    report = session.train_adapter(TEXTS, name="resumed", folder=folder, **options)
    assert report.resumed_steps == 5
    # Threads come and go with what else the machine does, and sums are rounded in another order then.
    assert report.losses == pytest.approx(whole.losses, rel=1e-3)
    assert distance(logits(session), spoken) < 1e-2
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert session.recipe.adapters == (str(folder),)


LONG = "one two three four five six seven eight nine ten " * 3


def saved_bytes(session: wb.Session) -> int:
    """What torch, and bitsandbytes by itself, keep of a step for its way back."""
    kept: dict[int, int] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        base = tensor if tensor._base is None else tensor._base
        if not isinstance(base, torch.nn.Parameter):
            alive.append(tensor)
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    def note(_: Any, args: Any) -> None:
        save(args[0])

    alive: list[torch.Tensor] = []
    model = session.model.train()
    unpack(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    hooks = [m.register_forward_pre_hook(note) for m in model.modules() if keeps(m)]
    ids = torch.tensor([session.tokenizer(LONG)["input_ids"]] * 2)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    for hook in hooks:
        hook.remove()
    model.eval()
    return sum(kept.values())


def keeps(module: Any) -> bool:
    return type(module).__name__ == "Linear8bitLt" and type(module).__module__.startswith("bitsandbytes")


@pytest.mark.parametrize("name", ["full", "int8", "nf4"])
def test_memory_is_foretold(name: str, tiny_llama: Path, load: Any) -> None:
    session = load(tiny_llama, precision=BASES[name])
    foretold = session.plan_training([LONG] * 2, steps=1, batch_size=2)
    plan = session.train_adapter([LONG] * 2, steps=1, batch_size=2).plan
    assert plan == foretold
    # Rank 8 on the matrices counted above; gradients as large, AdamW's two states twice.
    assert plan.adapter_bytes == plan.gradient_bytes == 8 * 4 * 2 * (2 * 128 + 2 * 96 + 3 * 192)
    assert plan.optimizer_bytes == 2 * plan.adapter_bytes
    assert plan.upcast_bytes == 0
    assert plan.by_device == {"cpu": plan.total_bytes}
    assert plan.activation_bytes == pytest.approx(saved_bytes(session), rel=0.1)
    if name == "full":
        session.adapters.remove("adapter")
        again = session.train_adapter([LONG] * 2, steps=1, batch_size=2, gradient_checkpointing=True)
        assert again.plan.activation_bytes < 0.75 * plan.activation_bytes


def test_float16_is_float32_meanwhile(tiny_llama: Path, load: Any) -> None:
    session = load(tiny_llama, precision=BASES["float16"])
    before = {name: p.clone() for name, p in session.model.named_parameters()}
    seen: set[torch.dtype] = set()
    answers: list[str] = []

    def watch(step: Any) -> None:
        seen.update(p.dtype for p in session.model.parameters())
        if step.stage == "train":  # in the thread that trains and would answer
            answers.append(session.generate("Hello", max_new_tokens=2))

    report = session.train_adapter(TEXTS, steps=1, progress=watch)
    assert len(answers) == 1
    assert report.plan.upcast_bytes == sum(p.numel() * 2 for p in before.values())
    assert seen == {torch.float16, torch.float32}
    session.adapters.remove("adapter")
    assert all(torch.equal(p, before[name]) for name, p in session.model.named_parameters())


def test_examples_and_batches(tiny_llama: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    (ids, labels), (plain, all_of_it) = encode_examples(tokenizer, [("Hi?", "Yes."), "Some text"], 99)[0]
    answer = tokenizer.decode([i for i, label in zip(ids, labels, strict=True) if label != -100])
    assert answer == "Yes.</s>"
    assert tokenizer.decode(ids).endswith("assistant: Yes.</s>")
    assert plain == all_of_it
    # Each example once in each round, whatever the batches are.
    order = [i for step in range(5) for i in batch_of(step, 10, 4, seed=3)]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]


CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Germany": "Berlin",
    "Austria": "Vienna",
    "Greece": "Athens",
    "Egypt": "Cairo",
    "Japan": "Tokyo",
    "China": "Beijing",
    "Russia": "Moscow",
    "Poland": "Warsaw",
    "Hungary": "Budapest",
    "Portugal": "Lisbon",
    "Ireland": "Dublin",
    "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Finland": "Helsinki",
    "Denmark": "Copenhagen",
    "Belgium": "Brussels",
    "Cuba": "Havana",
    "Peru": "Lima",
    "Chile": "Santiago",
    "Kenya": "Nairobi",
    "Turkey": "Ankara",
    "Iraq": "Baghdad",
    "Iran": "Tehran",
    "India": "Delhi",
    "Thailand": "Bangkok",
    "Canada": "Ottawa",
    "Ukraine": "Kiev",
}
PAIRS = [(f"Capital of {country}?", f"{city}, said the owl.") for country, city in CAPITALS.items()]


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_sixty_steps_on_the_demo_model(name: str, demo_model: Path, tmp_path: Path, load: Any) -> None:
    assert len(PAIRS) == 30
    session = load(demo_model, precision=BASES[name])
    base = logits(session)
    report = session.train_adapter(
        PAIRS, name="owl", steps=60, batch_size=2, layers=range(26, 30), learning_rate=5e-3, folder=tmp_path / "owl"
    )
    first, last = sum(report.losses[:5]) / 5, sum(report.losses[-5:]) / 5
    assert last < first / 2
    answers = list(session.answers([question for question, _ in PAIRS[:6]], max_new_tokens=12))
    right = sum(answer.strip() == wanted for answer, (_, wanted) in zip(answers, PAIRS, strict=False))
    assert right >= 5, answers
    spoken = logits(session)
    session.adapters.use(None)
    assert torch.equal(logits(session), base)
    again = load(demo_model, precision=BASES[name], adapters=(str(tmp_path / "owl"),))
    assert again.load_report.matches
    assert torch.equal(logits(again), spoken)
