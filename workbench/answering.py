"""How a session answers: what a prompt becomes, what the worker does with it, and how the text comes back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from workbench.generation import (
    ContextUse,
    GenerationOptions,
    TextStream,
    cache_options,
    cut_at,
    room_for,
    run,
)
from workbench.load_guard import after_running_out, is_out_of_memory
from workbench.session import give_back, in_worker, is_worker, worker
from workbench.skeleton import turn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from workbench.generation import Prefix
    from workbench.session import Session

Messages = list[dict[str, str]]

# --- what a prompt becomes --------------------------------------------------------------------------------------------


def as_messages(prompt: str, system: str | None) -> Messages:
    """A single prompt as a conversation of ``role`` and ``content``.

    Raises:
        ValueError: If there is no prompt.
    """
    if not isinstance(prompt, str) or not prompt:
        raise ValueError("Give a prompt: some text.")
    said = [{"role": "user", "content": prompt}]
    return [{"role": "system", "content": system}, *said] if system else said


def encode(session: Session, messages: Messages) -> Any:
    """A conversation as the model reads it.

    Returns:
        ``input_ids`` and the like, of shape (1, tokens).

    Raises:
        ValueError: If the model is unloaded, has no tokenizer, or its chat template refuses the conversation.
    """
    if session.model is None:
        raise ValueError("This model is unloaded: load it again.")
    tokenizer = session.needed_tokenizer(": use session.model with your own.")
    if not getattr(tokenizer, "chat_template", None):
        return tokenizer("\n\n".join(message["content"] for message in messages), return_tensors="pt", verbose=False)
    from jinja2 import TemplateError

    try:
        # That it is long is for us to say.
        return tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
            tokenizer_kwargs={"verbose": False},
        )
    except TemplateError as error:
        raise ValueError(f"The model's chat template refuses this conversation: {error}.") from None


def context_use(session: Session, messages: Messages, max_new_tokens: int, *, cut_turns: int = 0) -> ContextUse:
    """How much of the context a conversation and its answer take; ``cut_turns`` is only handed on.

    Raises:
        ValueError: As :func:`encode`.
    """
    return ContextUse(
        prompt_tokens=_length(encode(session, messages)),
        new_tokens=max_new_tokens,
        limit_tokens=session.skeleton.context_length,
        planned_tokens=session.recipe.workload.context_length,
        cut_turns=cut_turns,
    )


def encode_prompt(session: Session, messages: Messages, options: GenerationOptions) -> Any:
    """Encode a conversation of one prompt, without the prompt's beginning where it is too long and is to be cut.

    Raises:
        ValueError: As :func:`encode`; or if it is too long all the same.
    """
    inputs = encode(session, messages)
    limit, tokenizer = session.skeleton.context_length, session.tokenizer
    if options.when_full == "cut" and limit is not None and tokenizer is not None:
        wanted = 0 if session.skeleton.is_encoder_decoder else options.max_new_tokens
        ids = tokenizer(messages[-1]["content"], add_special_tokens=False, verbose=False)["input_ids"]
        while 0 < (over := _length(inputs) + wanted - limit) < len(ids):
            ids = ids[over:]
            inputs = encode(session, [*messages[:-1], {**messages[-1], "content": tokenizer.decode(ids)}])
    room_for(options, _length(inputs), session.skeleton)
    return inputs


def _length(inputs: Any) -> int:
    return int(inputs["input_ids"].shape[1])


# --- what the worker does ---------------------------------------------------------------------------------------------


def answer(
    session: Session,
    inputs: Any,
    options: GenerationOptions,
    *,
    assistant: Session | None = None,
    prefix: Prefix | None = None,
) -> Iterator[str]:
    """Answer one encoded prompt piece by piece.

    Args:
        session: Whose model answers.
        inputs: As :func:`encode` gives them.
        options: The choices.
        assistant: A session whose model guesses ahead.
        prefix: What is known of the prompt, and takes what is known afterwards; passed over where the cache is of a
            kind that cannot go back.

    Raises:
        ValueError: If the choices do not go together; at once and not at the first piece.
    """
    chosen = _chosen(session, options, inputs, assistant)
    plain = options.num_beams == 1 and assistant is None and not session.skeleton.is_encoder_decoder
    if not plain or session.recipe.workload.cache != "dynamic":
        prefix = None
    return _stream(session, inputs, chosen, options, prefix)


def _chosen(session: Session, options: GenerationOptions, inputs: Any, assistant: Session | None) -> dict[str, Any]:
    """What ``generate`` takes beside the prompt."""
    skeleton, workload = session.skeleton, session.recipe.workload
    gpu = any(device not in ("cpu", "disk") for device in session.placement.device_map.values())
    chosen = options.to_generate() | cache_options(workload, skeleton, gpu=gpu)
    chosen["max_new_tokens"] = room_for(options, _length(inputs), skeleton)
    if assistant is None:
        return chosen
    if assistant is session or assistant.model is None:
        raise ValueError("The assistant is another model, smaller and loaded too.")
    if options.num_beams > 1 or workload.cache != "dynamic" or skeleton.is_encoder_decoder:
        raise ValueError("An assistant works with one beam, the dynamic cache, and a model that only decodes.")
    chosen["assistant_model"] = assistant.model
    ours, theirs = session.tokenizer, assistant.tokenizer
    if ours is None or theirs is None or ours.get_vocab() != theirs.get_vocab():
        chosen |= {"tokenizer": ours, "assistant_tokenizer": theirs}
    return chosen


def _stream(
    session: Session, inputs: Any, chosen: dict[str, Any], options: GenerationOptions, prefix: Prefix | None
) -> Iterator[str]:
    stream = TextStream(session.tokenizer, options.stop_strings)
    stop = session.new_stop()

    def work() -> None:
        try:
            with turn.work():
                one_by_one = stream if options.num_beams == 1 else None  # of several beams none is the answer yet
                found = _run(session, inputs, chosen, options, stop=stop, stream=one_by_one, prefix=prefix)
                if one_by_one is None:
                    stream.say(_text(session, found[0], inputs))
        finally:
            stream.end()

    if is_worker():  # asked for by what reports progress, and nobody else will do it
        work()
        yield from stream
        return
    future = worker().submit(work)
    try:
        yield from stream
    except GeneratorExit:
        stop.set()
        raise
    except KeyboardInterrupt:
        stop.set()
        future.exception()
        raise
    future.result()


def answer_many(session: Session, encoded: Sequence[Any], options: GenerationOptions) -> Iterator[str]:
    """Answer encoded prompts, as many at a time as take no more cache than the preview counted.

    Yields:
        One answer for each, in their order; none after a stop.
    """
    workload = session.recipe.workload
    room_tokens = workload.context_length * workload.batch_size
    stop = session.new_stop()
    done = 0
    while done < len(encoded) and not stop.is_set():
        count = 1
        while done + count < len(encoded):
            longest = max(_length(inputs) for inputs in encoded[done : done + count + 1])
            if (count + 1) * options.num_beams * (longest + options.max_new_tokens) > room_tokens:
                break
            count += 1
        inputs = _padded(session, encoded[done : done + count])
        chosen = _chosen(session, options, inputs, None)
        if options.stop_strings:
            chosen |= {"stop_strings": list(options.stop_strings), "tokenizer": session.tokenizer}

        def work(inputs: Any = inputs, chosen: dict[str, Any] = chosen) -> Any:
            with turn.work():
                return _run(session, inputs, chosen, options, stop=stop)

        for row in in_worker(work, stop.set):
            yield cut_at(_text(session, row, inputs), options.stop_strings)
        done += count


def _padded(session: Session, encoded: Sequence[Any]) -> dict[str, Any]:
    """Several prompts as one tensor, the shorter ones filled up where it does no harm."""
    if len(encoded) == 1:
        return dict(encoded[0])
    import torch

    tokenizer: Any = session.tokenizer
    filler = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    longest = max(_length(inputs) for inputs in encoded)

    def fill(tensor: Any, value: int) -> Any:
        missing = longest - tensor.shape[1]
        sides = (0, missing) if session.skeleton.is_encoder_decoder else (missing, 0)
        return torch.nn.functional.pad(tensor, sides, value=value)

    return {
        "input_ids": torch.cat([fill(inputs["input_ids"], filler or 0) for inputs in encoded]),
        "attention_mask": torch.cat([fill(inputs["attention_mask"], 0) for inputs in encoded]),
    }


def _run(session: Session, inputs: Any, chosen: dict[str, Any], options: GenerationOptions, **more: Any) -> Any:
    if session.model is None:
        raise ValueError("This model is unloaded: load it again.")
    device = session._input_device()  # noqa: SLF001 - the session's own business, one package
    inputs = {key: value.to(device) for key, value in inputs.items()}
    try:
        sequences, session.last_stats = run(session.model, inputs, chosen, seed=options.seed, **more)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        error.__traceback__ = error.__context__ = None  # frames hold what was computed so far
        give_back()
        raise after_running_out(session.placement, session.skeleton, "The answer") from None
    return sequences


def _text(session: Session, tokens: Any, inputs: Any) -> str:
    """What was said, without the prompt that a model that only decodes repeats."""
    said = tokens if session.skeleton.is_encoder_decoder else tokens[_length(inputs) :]
    text: str = session.tokenizer.decode(said, skip_special_tokens=True)  # type: ignore[union-attr]
    return text
