"""A conversation: what was said, and the cache of it, so that a turn does not compute again what the last one had."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from workbench.answering import answer, context_use, encode
from workbench.generation import ContextUse, GenerationOptions, Prefix, make_options, room_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from workbench.answering import Messages
    from workbench.session import Session


class Chat:
    """A conversation with a loaded model.

    The cache of the last turn is kept until the next one, in memory that the preview counted.

    Args:
        session: The loaded model.
        system: A system prompt, where the chat template knows one; None is the template's own.

    Attributes:
        system: The system prompt; it can be changed between turns.
        messages: What was said: ``{"role": "user" or "assistant", "content": ...}``, in turns.
    """

    def __init__(self, session: Session, *, system: str | None = None) -> None:
        self._session = session
        self._prefix = Prefix()
        self.system = system
        self.messages: Messages = []
        session.remember(self._prefix)

    def send(self, text: str, *, assistant: Session | None = None, **options: Any) -> Iterator[str]:
        """Say something and hear the answer piece by piece; both are part of the conversation then.

        Args:
            text: What the user says.
            assistant: As for :meth:`Session.stream`.
            **options: Those of :class:`GenerationOptions`. ``when_full="cut"`` leaves out the oldest turns.

        Yields:
            Pieces of text; leaving the loop stops the answer, and what was said of it counts.

        Raises:
            ValueError: If an option is out of range or the conversation too long; nothing was said then.
            TypeError: If an option is unknown.
        """
        if not isinstance(text, str) or not text.strip():
            raise ValueError("Say something first.")
        return self._answer([*self.messages, {"role": "user", "content": text}], assistant, options)

    def regenerate(self, *, assistant: Session | None = None, **options: Any) -> Iterator[str]:
        """Answer the last thing that the user said anew, in place of what was answered; else as :meth:`send`."""
        asked = [index for index, message in enumerate(self.messages) if message["role"] == "user"]
        if not asked:
            raise ValueError("Nothing has been said yet: send() something first.")
        return self._answer(self.messages[: asked[-1] + 1], assistant, options)

    def edit(self, index: int, text: str, *, assistant: Session | None = None, **options: Any) -> Iterator[str]:
        """Say something else in place of a message of the user; what followed it is forgotten. Else as :meth:`send`.

        Args:
            index: Which of :attr:`messages`.
            text: What the user says there.
            assistant: As for :meth:`send`.
            **options: As for :meth:`send`.
        """
        if not 0 <= index < len(self.messages) or self.messages[index]["role"] != "user":
            users = ", ".join(str(i) for i, message in enumerate(self.messages) if message["role"] == "user")
            raise ValueError(f"Only what the user said can be edited: message {users or '(none yet)'}, not {index}.")
        if not isinstance(text, str) or not text.strip():
            raise ValueError("Say something first.")
        return self._answer([*self.messages[:index], {"role": "user", "content": text}], assistant, options)

    def clear(self) -> None:
        """Forget the conversation and give its cache back."""
        self.messages = []
        self._prefix.forget()

    def context_use(self, text: str = "", **options: Any) -> ContextUse:
        """How much of the context the conversation takes, with something said next and its answer.

        Args:
            text: What would be said next; empty for the conversation as it is.
            **options: As for :meth:`send`; of them ``max_new_tokens`` and ``when_full`` count.

        Raises:
            ValueError: If the model is unloaded or has no tokenizer.
        """
        said = [*self.messages, *([{"role": "user", "content": text}] if text else [])]
        if not said:
            return ContextUse(
                prompt_tokens=0,
                new_tokens=make_options(options).max_new_tokens,
                limit_tokens=self._session.skeleton.context_length,
                planned_tokens=self._session.recipe.workload.context_length,
            )
        return self._fit(said, make_options(options))[1]

    def _fit(self, said: Messages, options: GenerationOptions) -> tuple[Messages, ContextUse]:
        """The conversation as it is read, and what it takes: without its oldest turns, if that was asked for."""
        begin = [{"role": "system", "content": self.system}] if self.system else []
        cut = 0
        while True:
            read = [*begin, *said]
            use = context_use(self._session, read, options.max_new_tokens, cut_turns=cut)
            later = next((i for i, message in enumerate(said) if i and message["role"] == "user"), None)
            if not use.overflows or options.when_full != "cut" or later is None:
                return read, use
            said, cut = said[later:], cut + 1

    def _answer(self, said: Messages, assistant: Session | None, options: dict[str, Any]) -> Iterator[str]:
        chosen = make_options(options)
        read, use = self._fit(said, chosen)
        room_for(chosen, use.prompt_tokens, self._session.skeleton)
        pieces = answer(self._session, encode(self._session, read), chosen, assistant=assistant, prefix=self._prefix)
        return self._hear(said, pieces)

    def _hear(self, said: Messages, pieces: Iterator[str]) -> Iterator[str]:
        before, heard = self.messages, ""
        self.messages = said
        try:
            for piece in pieces:
                heard += piece
                yield piece
        except Exception:
            self.messages = before
            raise
        finally:
            if self.messages is said:
                self.messages = [*said, {"role": "assistant", "content": heard}]
