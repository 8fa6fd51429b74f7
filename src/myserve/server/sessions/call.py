"""One request in a session: its prompt goes on from the ids that are kept, and its answers are kept when they end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from myserve.engine.token_bytes import TokenBytes
from myserve.server.choice import Choice
from myserve.server.prompts.required_prefix import behind_turns, turns_of
from myserve.server.sessions.chain import beginnings, behind, head, of_thought
from myserve.server.sessions.context import with_sampled_answers
from myserve.server.sessions.kept import KeptSession, KeptTurn, Said, common_tokens, turn_bytes
from myserve.server.sessions.store import Sessions
from myserve.wire.chat import ChatCompletionRequest, ChatMessage
from myserve.wire.sessions import Drift, SessionAnswer
from myserve.wire.structured import Tool

__all__ = ["SessionCall"]

MOST_TURNS = 16_384  # of one session

_NO_THOUGHT = of_thought(ChatMessage(role="assistant", content="", reasoning_content=""))


class _Origin(NamedTuple):
    """The turn that a prompt goes on from, as it was when the request came."""

    model: str
    parent: KeptTurn | None
    drift: Sequence[Drift]


@dataclass(slots=True)
class SessionCall:
    """Hold one request's place in its session.

    What the request goes on from is decided once, when its prompt is made: of requests side by side none sees another.
    """

    sessions: Sessions
    session: KeptSession
    model: str  # as the request names it: another one's tokens are never gone on from
    eos_ids: Sequence[int]
    request_id: str
    _chain: list[bytes] = field(default_factory=list)  # of the messages; empty: it is no chat
    _begun: str = ""  # the text of the last message, where the answer goes on with it
    _drift: list[Drift] = field(default_factory=list)
    _origins: dict[int, _Origin] = field(default_factory=dict)  # by prompt
    _turns: dict[int, KeptTurn | None] = field(default_factory=dict)  # by choice

    def spliced(
        self,
        rendered: list[int],
        request: ChatCompletionRequest,
        tools: Sequence[Tool],
        template_kwargs: dict[str, Any],
        token_bytes: TokenBytes,
        *,
        is_required: bool = False,
    ) -> list[int]:
        """Return a rendered conversation's ids with those that are kept in place of its beginning.

        `is_required`: the request says itself which ids it begins with, and they are in place already.
        """
        start = head(self.model, tools, template_kwargs | {"chat_template": request.chat_template})
        chain = beginnings(start, request.messages)
        thoughts = [of_thought(message) for message in request.messages]
        goes_on = bool(request.continue_final_message)
        self._chain, self._begun = (chain[:-1], request.messages[-1].text) if goes_on else (chain, "")
        prompt = rendered
        if not is_required:
            turn = self.session.by_messages(chain, thoughts)
            prompt = self._with_kept(turn, rendered, request.messages, token_bytes, goes_on=goes_on)
        if self.session.has_prompt(self.model, prompt):
            return prompt
        left = self.session.left_at(chain, thoughts)
        if left is not None:
            at, other = left
            self._note(at, common_tokens(prompt, other.token_ids), "edited", "sent")
        elif self.session.turns and not self.session.has_begun(start):
            self._note(0, common_tokens(prompt, self.session.turns[-1].token_ids), "tools", "sent")
        return prompt

    def goes_on_from(
        self, prompts: Sequence[Sequence[int]], adapters: Sequence[str | None] | None = None
    ) -> None:
        """Look up what each prompt goes on from. Called once, on the event loop, before anything is drawn.

        `adapters`: of each prompt, where the request names them one by one.
        """
        for position, prompt in enumerate(prompts):
            model = (adapters[position] if adapters else None) or self.model
            parent = self.session.by_ids(model, prompt)
            drift = self._drift if self._chain else self._drift_of_ids(model, parent, prompt)
            self._origins[position] = _Origin(model, parent, drift)

    def add(self, choice: Choice, message: ChatMessage | None) -> None:
        """Keep an answer that has ended. `message`: what it says, where the request was a chat."""
        if self.session.is_deleted or not choice.sampled or choice.index in self._turns:
            return
        origin = self._origins[choice.prompt]
        new = len(choice.prompt_token_ids) - (origin.parent.end if origin.parent else 0)
        size = turn_bytes(new, len(choice.sampled), len(self._chain))
        if len(self.session.turns) >= MOST_TURNS or not self.sessions.make_room(self.session, size):
            self.session.num_not_kept += 1
            return
        before = self.session.num_bytes
        self._turns[choice.index] = self.session.add(
            choice,
            request_id=self.request_id,
            model=origin.model,
            parent=origin.parent,
            said=self._said(message),
            drift=origin.drift,
            eos_ids=self.eos_ids,
        )
        self.sessions.has_grown(self.session, self.session.num_bytes - before)

    def told(self, choice: Choice) -> SessionAnswer:
        """Return what the answer says of its session."""
        _, parent, drift = self._origins[choice.prompt]
        turn = self._turns.get(choice.index)
        kept = parent.end if parent else 0
        return {
            "id": self.session.id,
            "turn": None if turn is None else turn.number,
            "continues": None if parent is None else parent.number,
            "kept_tokens": kept,
            "new_tokens": len(choice.prompt_token_ids) - kept,
            "drift": list(drift),
        }

    def _with_kept(
        self,
        turn: KeptTurn | None,
        rendered: list[int],
        messages: Sequence[ChatMessage],
        token_bytes: TokenBytes,
        *,
        goes_on: bool,
    ) -> list[int]:
        """Return a turn's ids and what is rendered behind it; of the turn before, where its end is not found."""

        def text_of(ids: Sequence[int]) -> str:
            return token_bytes.decode(ids, skip_special_tokens=False)

        agreeing = turn
        while turn is not None and turn.num_messages:
            rest = self._rest(turn, rendered, messages, text_of, goes_on=goes_on)
            if rest is not None:
                prompt = turn.token_ids + self._with_sampled(rest, messages[turn.num_messages :])
                break
            turn = turn.parent
        else:
            turn, prompt = None, self._with_sampled(rendered, messages)
        if agreeing is None:
            return prompt
        same = common_tokens(agreeing.token_ids, prompt)
        held = turn if same < agreeing.end else agreeing
        if held is not None:
            self._note_kept(held, prompt, rendered, text_of)
        if held is not agreeing:
            self._note(self._message_at(agreeing, same), same, "template", "sent")
        return prompt

    def _with_sampled(self, rendered: list[int], messages: Sequence[ChatMessage]) -> list[int]:
        """Return rendered messages with the ids of those answers that were sampled in this session."""
        if self._begun:  # the last one goes on
            messages = messages[:-1]
        answers = [message for message in messages if message.role == "assistant"]
        kept = [self.session.by_answer(self._alone(answer), of_thought(answer)) for answer in answers]
        return with_sampled_answers(rendered, kept, self.eos_ids) if any(kept) else rendered

    def _alone(self, answer: ChatMessage) -> bytes:
        return behind(self.model.encode(), answer)

    def _rest(
        self,
        turn: KeptTurn,
        rendered: list[int],
        messages: Sequence[ChatMessage],
        text_of: Callable[[Sequence[int]], str],
        *,
        goes_on: bool,
    ) -> list[int] | None:
        """Return what is rendered behind a turn; None where its end is not found."""
        if goes_on and turn.num_messages == len(messages):
            return None if turn.has_ended else []
        answer = messages[turn.num_messages - 1]
        cut = behind_turns(rendered, turn.num_turns, answer, eos_ids=self.eos_ids, text_of=text_of)
        # one that ended at its limit gets the template's EOS
        return None if cut is None else rendered[cut - (not turn.has_ended) :]

    def _note_kept(
        self,
        turn: KeptTurn,
        prompt: Sequence[int],
        rendered: Sequence[int],
        text_of: Callable[[Sequence[int]], str],
    ) -> None:
        """Note where the rendered ids first differ from those that are kept."""
        at = common_tokens(prompt, rendered)
        if at >= turn.end:
            return
        part = next(part for part in turn.path if at < part.end)
        end = sum(map(len, islice(turns_of(rendered, self.eos_ids), part.num_turns)))
        kept, written = (
            text_of([i for i in ids if i not in self.eos_ids])
            for ids in (prompt[at : part.end], rendered[at:end])
        )
        reason = "retokenized" if kept == written else "rerendered"
        self._note(self._message_at(turn, at), at, reason, "kept")

    def _message_at(self, turn: KeptTurn, token: int) -> int:
        """Return the message that has a token of a turn's: its answer, or the first one that was new in its prompt.

        What a prompt ends with, behind its last EOS, opens the answer.
        """
        part = next(part for part in turn.path if token < part.end)
        before = part.parent.end if part.parent else 0
        if any(token_id in self.eos_ids for token_id in part.new[token - before :]):
            return part.parent.num_messages if part.parent else 0
        return max(0, part.num_messages - 1)

    def _drift_of_ids(self, model: str, parent: KeptTurn | None, prompt: Sequence[int]) -> list[Drift]:
        """Return where a prompt of ids or of text leaves the last turn; nowhere if it goes on, or is asked again."""
        goes_on = parent is not None and not parent.is_continued
        if goes_on or not self.session.turns or self.session.has_prompt(model, prompt):
            return []
        token = common_tokens(prompt, self.session.turns[-1].token_ids)
        return [{"message": None, "token": token, "reason": "edited", "used": "sent"}]

    def _said(self, message: ChatMessage | None) -> Said | None:
        if message is None or not self._chain:
            return None
        if self._begun:
            message = message.model_copy(update={"content": self._begun + message.text})
        thought = of_thought(message) or _NO_THOUGHT
        assert thought is not None
        return Said([*self._chain, behind(self._chain[-1], message)], thought, self._alone(message))

    def _note(self, message: int, token: int, reason: str, used: str) -> None:
        self._drift.append({"message": message, "token": token, "reason": reason, "used": used})  # type: ignore[typeddict-item]  # literals
