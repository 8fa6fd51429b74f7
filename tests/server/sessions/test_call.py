"""Kept ids and rendered rest fit together under the templates of every family: where a turn ends is found in each."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from chat_template_zoo import FAMILIES, family_tokenizer
from myserve.engine.outputs import Delta, TokenOutput
from myserve.engine.token_bytes import TokenBytes
from myserve.server.choice import Choice
from myserve.server.prompts.codec import Codec
from myserve.server.sessions.call import SessionCall
from myserve.server.sessions.kept import KeptSession, common_tokens
from myserve.server.sessions.store import Sessions
from myserve.server.sessions.trajectories import body_of, lasts
from myserve.wire.chat import ChatCompletionRequest, ChatMessage
from myserve.wire.structured import Function, Tool
from tokenizer_zoo import KINDS

ENDS = {
    "chatml": "<|im_end|>",
    "headers": "<|eot_id|>",
    "instructions": None,  # the tokenizer's own
    "turns": "<end_of_turn>",
    "roles": "<|end|>",
    "bars": "<｜end▁of▁sentence｜>",
    "named": "<|END_OF_TURN_TOKEN|>",
    "string or parts": "<stop>",
    "parts alone": "<stop>",
    "channels": "<|end|>",
}
# what the model writes before an answer's words, and the template does not open the answer with
OPENS = {"channels": "<|channel|>final<|message|>", "chatml": "<think>\nhm\n</think>\n"}
LOOK = Tool(type="function", function=Function(name="look"))


def user(text: str) -> ChatMessage:
    return ChatMessage(role="user", content=text)


def says(text: str) -> ChatMessage:
    return ChatMessage(role="assistant", content=text)


class Talk:
    """A conversation in a session, with a family's template and answers that are drawn in pieces."""

    def __init__(self, name: str, kind: str = "byte_level") -> None:
        tokenizer = family_tokenizer(name, kind)
        self.codec = Codec(tokenizer, TokenBytes(tokenizer, len(tokenizer)))
        end = ENDS[name]
        self.eos = tokenizer.eos_token_id if end is None else tokenizer.convert_tokens_to_ids(end)
        self.opens = OPENS.get(name, "")
        self.sessions = Sessions(timeout=60, most_bytes=1 << 20)
        self.tools: tuple[Tool, ...] = ()

    @property
    def session(self) -> KeptSession:
        return self.sessions.begin("", "talk")

    def rendered(self, messages: Sequence[ChatMessage]) -> list[int]:
        return self.codec.encode_chat(messages, {}, self.tools)

    def ask(
        self,
        messages: Sequence[ChatMessage],
        answer: ChatMessage,
        *,
        ends: bool = True,
        text: str | None = None,
    ) -> tuple[list[int], list[int], SessionCall, Choice]:
        """Return a prompt and what was drawn behind it: the characters of `text`, by default the answer's."""
        request = ChatCompletionRequest(model="m", messages=tuple(messages))
        call = SessionCall(
            self.sessions, self.session, "m", (self.eos,), f"request {len(self.session.turns)}"
        )
        prompt = call.spliced(self.rendered(messages), request, self.tools, {}, self.codec.token_bytes)
        call.goes_on_from([prompt])
        opened = self.codec.encode(self.opens, add_special_tokens=False) if self.opens else []
        written = answer.text if text is None else text
        pieces = [i for character in written for i in self.codec.encode(character, add_special_tokens=False)]
        drawn = opened + pieces + [self.eos] * ends
        choice = Choice(0, 0, prompt, seed=0, tokens=[TokenOutput(i, -1.0, -1.0) for i in drawn])
        choice.last = Delta(0, finish_reason="stop" if ends else "length")
        call.add(choice, answer)
        return prompt, drawn, call, choice


# these lose letters, or turn them round: an answer's words are not found in what is rendered
LOSSY = {"unigram", "wordpiece", "wordpiece_cleaned", "end_of_word", "word_level", "backwards"}
CASES = [
    *((name, "byte_level", ends) for name in FAMILIES for ends in (True, False)),
    *(("chatml", kind, True) for kind in KINDS if kind != "byte_level"),
]


@pytest.mark.parametrize(("name", "kind", "ends"), CASES)
def test_a_conversation_is_one_trajectory(name: str, kind: str, ends: bool) -> None:
    talk = Talk(name, kind)
    messages = [user("What is it?")]
    before: list[int] = []
    for turn in range(4):
        answer = says(f"It is {turn}, so.")
        prompt, drawn, call, choice = talk.ask(messages, answer, ends=ends)
        rendered = talk.rendered(messages)
        assert prompt[: len(before)] == before
        told = call.told(choice)
        assert (told["continues"], told["turn"]) == (turn - 1 if turn else None, turn)
        if turn:
            # behind the kept ids stands what is rendered behind that answer, and begins with the EOS that it lacks
            rest = prompt[len(before) :]
            assert rest == rendered[-len(rest) :] and (rest[0] == talk.eos) is not ends
            text = talk.codec.decode(rest)
            assert kind in LOSSY or (f"{turn}?" in text and "It is" not in text)
            assert rendered[: len(before)] != before, "the control: rendered, it is another"
            (drift,) = told["drift"]
            assert drift["used"] == "kept" and drift["token"] == common_tokens(prompt, rendered)
            assert drift["message"] == 1 and drift["reason"] in ("retokenized", "rerendered")
        before = prompt + drawn
        messages += [answer, user(f"And {turn + 1}?")]
    (made,) = body_of(talk.session, lasts(talk.session), 60.0)["trajectories"]
    assert made["token_ids"] == before


@pytest.mark.parametrize(
    "name", [name for name, family in FAMILIES.items() if family.has_tools and name != "named"]
)
def test_a_call_that_is_written_otherwise_is_the_same_turn(name: str) -> None:
    talk = Talk(name)
    talk.tools = (LOOK,)
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": 1.0,"n":2}'}}
    sent = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"n": 2, "at": 1}'}}
    asked = [user("Look")]
    written = '<tool_call>{"name":"look","arguments":{"at": 1.0,"n":2}}</tool_call>'
    answer = ChatMessage(role="assistant", content=None, tool_calls=(call,))
    prompt, drawn, *_ = talk.ask(asked, answer, text=written)
    found = ChatMessage(role="tool", content="7", tool_call_id="1")
    back = ChatMessage(role="assistant", content="", tool_calls=(sent,))
    later, _, next_call, choice = talk.ask([*asked, back, found], says("7"))
    assert later[: len(prompt) + len(drawn)] == prompt + drawn
    assert [drift["reason"] for drift in next_call.told(choice)["drift"]] == ["rerendered"]


def test_only_the_turns_end_is_looked_for() -> None:
    """What is rendered before may differ: a template that writes the date, and is asked after midnight."""
    talk = Talk("channels")
    first, drawn, *_ = talk.ask([user("Hi")], says("So."))
    tokenizer = talk.codec._tokenizer
    tokenizer.chat_template = tokenizer.chat_template.replace("Effort: ", "Tomorrow. Effort: ")
    second, _, call, choice = talk.ask([user("Hi"), says("So."), user("On")], says("Yes."))
    assert second[: len(first) + len(drawn)] == first + drawn
    (drift,) = call.told(choice)["drift"]
    assert (drift["message"], drift["reason"], drift["used"]) == (0, "rerendered", "kept")


def test_common_tokens_of_long_lists() -> None:
    one = list(range(20_000))
    for at in (0, 4095, 4096, 12_345, 19_999):
        other = [*one[:at], -1, *one[at + 1 :]]
        assert common_tokens(one, other) == at and common_tokens(other, one) == at
    assert common_tokens(one, one[:8192]) == 8192 and common_tokens(one, one) == 20_000


def test_whatever_a_client_does_each_sampled_token_has_its_loss_once() -> None:
    """Random conversations: answers drawn, edited, cut off, asked again, branched from anywhere."""
    rng = random.Random(5)
    talk = Talk("chatml")
    known: list[list[ChatMessage]] = [[]]
    ran = []
    for step in range(150):
        messages = list(rng.choice(known))
        what = rng.random()
        if messages and what < 0.2:
            at = rng.randrange(len(messages))
            messages[at] = messages[at].model_copy(update={"content": f"edit {step}"})
        elif len(messages) > 2 and what < 0.35:
            del messages[: rng.randrange(1, len(messages)) // 2 * 2]
        if not messages or messages[-1].role == "assistant" or what > 0.9:
            messages.append(user(f"Ask {rng.randrange(3)}?"))
        answer = says(f"Answer {rng.randrange(3)}.")
        prompt, drawn, call, choice = talk.ask(messages, answer, ends=rng.random() < 0.8)
        told = call.told(choice)
        kept = prompt[: told["kept_tokens"]]
        if told["continues"] is not None:
            assert talk.session.turns[told["continues"]].token_ids == kept
        for drift in told["drift"]:
            assert drift["token"] <= len(prompt) and (drift["message"] or 0) <= len(messages)
        ran.append((prompt, drawn))
        known.append([*messages, answer])
    turns, ends = talk.session.turns, lasts(talk.session)
    assert {tuple(turn.token_ids) for turn in turns} == {tuple(prompt + drawn) for prompt, drawn in ran}
    assert len(turns) < len(ran), "some were asked and drawn again"
    assert sum(turn.parent is not None for turn in turns) > 40
    found = body_of(talk.session, ends, 60.0)["trajectories"]
    assert sum(sum(one["loss_mask"]) for one in found) == sum(len(turn.sampled) for turn in turns)
    for one in found:
        assert len({len(one["token_ids"]), len(one["loss_mask"]), len(one["logprobs"])}) == 1
        assert [value is None for value in one["logprobs"]] == [
            not any(turn["start"] <= at < turn["end"] for turn in one["turns"])
            for at in range(len(one["token_ids"]))
        ]
        if one["branch"] is not None:
            shared, other = one["branch"]["tokens"], found[one["branch"]["trajectory"]]
            assert one["branch"]["trajectory"] > one["index"]
            assert one["token_ids"][:shared] == other["token_ids"][:shared]
            assert not any(one["loss_mask"][:shared])
    assert talk.session.num_bytes == sum(talk.sessions._num_bytes.values())


def test_long_and_wide_sessions_take_no_recursion_and_no_square() -> None:
    session = KeptSession("s", "", created=0.0, used=0.0)
    parent, prompt = None, [5]
    for number in range(3000):
        choice = Choice(0, 0, list(prompt), seed=0, tokens=[TokenOutput(number % 50, -1.0, -1.0)])
        parent = session.add(
            choice, request_id=str(number), model="m", parent=parent, said=None, drift=(), eos_ids=(7,)
        )
        prompt += [number % 50, 9]
    for number in range(3000):
        choice = Choice(0, 0, [1, 2], seed=0, tokens=[TokenOutput(number + 100, -1.0, -1.0)])
        session.add(
            choice, request_id=f"w{number}", model="m", parent=None, said=None, drift=(), eos_ids=(7,)
        )
    assert session.by_ids("m", prompt) is parent
    body = body_of(session, lasts(session), 60.0)
    long, *wide = body["trajectories"]
    assert len(long["turns"]) == 3000 and len(long["token_ids"]) == 6000
    assert [one["retried"] for one in wide] == [True] * 2999 + [False]
