"""What was sampled is never encoded again, whatever the template writes around it."""

from __future__ import annotations

import pytest

from myserve.sdk import Conversation, DeploymentSampler, SamplingError
from myserve.sdk.records.columns import to_columns
from myserve.sdk.testing import FakeToken, ScriptedTransport, ToyTokenizer, tiny_model

pytestmark = pytest.mark.asyncio
SYSTEM = {"role": "system", "content": "Be brief."}


class MergingTokenizer(ToyTokenizer):
    """Writes "ab" as one token, 300: text that was sampled as two tokens encodes to one."""

    def encode(self, text, add_special_tokens=False):
        ids: list[int] = []
        for token_id in super().encode(text):
            merges = ids and (ids[-1], token_id) == (97, 98)
            ids[-1:] = [300] if merges else [*ids[-1:], token_id]
        return ids

    def decode(self, token_ids, skip_special_tokens=False, **_):
        parts = [[97, 98] if i == 300 else [i] for i in token_ids]
        return super().decode([i for part in parts for i in part], skip_special_tokens)


def talk(tokenizer=None, next_token=None) -> Conversation:
    transport = ScriptedTransport(model=next_token or tiny_model())
    sampler = DeploymentSampler(
        "http://test", "toy", tokenizer=tokenizer or ToyTokenizer(), transport=transport
    )
    return Conversation(sampler, [SYSTEM])


def always(*answer: int):
    def next_token(prompt, so_far, seed, index):
        return FakeToken(answer[len(so_far)], -0.5) if len(so_far) < len(answer) else None

    return next_token


async def test_each_prompt_begins_with_the_last_one_and_what_was_sampled():
    conversation = talk()
    before: list[int] = []
    for turn in range(4):
        completion = await conversation.say(f"turn {turn}", max_tokens=12, seed=turn)
        assert completion.prompt_tokens[: len(before)] == before
        before = completion.full_tokens
        assert conversation.tokens == before
    requests = conversation.sampler.backend.transport.requests
    assert [len(r["prompt"]) for r in requests] == sorted(len(r["prompt"]) for r in requests)


async def test_where_nothing_drifts_the_tokens_are_the_templates_own():
    conversation = talk(next_token=always(52, 257))  # "4" and the end of turn
    await conversation.say("2+2=")
    await conversation.answer([{"role": "tool", "content": "4"}, {"role": "user", "content": "Sure?"}])
    rendered = ToyTokenizer().apply_chat_template(conversation.messages)
    assert conversation.tokens == rendered[: len(conversation.tokens)]
    assert rendered[len(conversation.tokens) :] == [10]  # only the newline after the last turn
    assert conversation.drift == 0


async def test_drift_is_counted_and_does_not_happen():
    conversation = talk(MergingTokenizer(), always(97, 98, 257))  # "ab", as no tokenizer would write it
    for turn in range(3):
        await conversation.say(f"turn {turn}")
    assert conversation.drift == 3
    sampled = [
        t
        for t, is_sampled in zip(conversation.tokens, conversation.trajectory().is_sampled, strict=True)
        if is_sampled
    ]
    assert sampled == [97, 98, 257] * 3
    # Control: the usual way would have changed them.
    assert 300 in MergingTokenizer().apply_chat_template(conversation.messages)


async def test_an_answer_that_ran_out_of_length_is_closed_by_the_template():
    conversation = talk(next_token=always(97, 97, 97, 97))
    await conversation.say("first", max_tokens=2)
    await conversation.say("second", max_tokens=2)
    assert (
        ToyTokenizer().decode(conversation.tokens).count("aa<|im_end|>\n<|im_start|>user\nsecond<|im_end|>")
        == 1
    )


async def test_a_trajectory_is_one_training_sample():
    conversation = talk()
    for turn in range(2):
        await conversation.say(f"turn {turn}", max_tokens=8, logprobs=True, seed=turn)
    sample = conversation.trajectory()
    assert len(sample.tokens) == len(sample.is_sampled) == len(sample.logprobs)
    for is_sampled, logprob in zip(sample.is_sampled, sample.logprobs, strict=True):
        assert (logprob is not None) == is_sampled


async def test_a_turn_that_fails_changes_nothing():
    def broken(prompt, so_far, seed, index):
        raise OSError("unplugged")

    conversation = talk(next_token=broken)
    with pytest.raises((SamplingError, OSError)):
        await conversation.say("hello", timeout=0.05)
    assert (conversation.tokens, conversation.messages) == ([], [SYSTEM])


async def test_truncation_drops_whole_turns_and_keeps_the_answers_tokens():
    conversation = talk(MergingTokenizer(), always(97, 98, 257))  # answers that encoding anew would change
    for turn in range(4):
        await conversation.say(f"turn {turn}", logprobs=True)
    before = conversation.trajectory()
    conversation.truncate(keep=2)
    text = ToyTokenizer().decode([97 if t == 300 else t for t in conversation.tokens])
    assert "turn 1" not in text and text.index("Be brief.") < text.index("turn 2") < text.index("turn 3")
    assert 300 not in conversation.tokens  # what was sampled is not encoded again, here either
    assert conversation.messages == [SYSTEM, *conversation.messages[1:]] and len(conversation.messages) == 5
    completion = await conversation.say("turn 4", logprobs=True)
    assert completion.prompt_tokens[: len(conversation.tokens) - 3] == conversation.tokens[:-3]
    first, second = conversation.trajectories()
    assert first == before
    # Each answer is trained on once, in the context that it was sampled in.
    assert (sum(first.is_sampled), sum(second.is_sampled)) == (4 * 3, 3)
    assert [p is None for p in second.logprobs] == [not s for s in second.is_sampled]


async def test_with_a_longest_context_the_oldest_turns_go_and_the_preamble_stays():
    conversation = Conversation(talk().sampler, [SYSTEM], max_context=160)
    for turn in range(9):
        completion = await conversation.say(f"turn {turn}", max_tokens=16, seed=turn)
        assert completion.prompt_len + 16 <= 160
        assert ToyTokenizer().decode(completion.prompt_tokens).startswith("<|im_start|>system\nBe brief.")
    assert len(conversation.trajectories()) > 2
    # Control: without it the context grows beyond.
    endless = Conversation(talk().sampler, [SYSTEM])
    for turn in range(9):
        await endless.say(f"turn {turn}", max_tokens=16, seed=turn)
    assert len(endless.tokens) > 160 and len(endless.trajectories()) == 1


async def test_a_tools_result_goes_with_the_call_that_it_answers():
    conversation = talk(next_token=always(52, 257))
    await conversation.say("2+2=")
    await conversation.answer([{"role": "tool", "content": "4"}])
    await conversation.say("Sure?")
    conversation.truncate(keep=2)
    assert [m["role"] for m in conversation.messages] == ["system", "user", "assistant"]
    conversation.truncate(keep=0)
    assert (conversation.messages, conversation.tokens) == ([SYSTEM], [])


async def test_columns_give_every_completion_back():
    conversation = talk()
    completions = await conversation.sampler.sample_with_prompt_tokens(
        [1, 2], n=5, logprobs=True, max_tokens=9
    )
    columns = to_columns(completions)
    for i, c in enumerate(completions):
        part = slice(columns["offsets"][i], columns["offsets"][i + 1])
        assert columns["tokens"][part].tolist() == c.full_tokens
        assert columns["logprobs"][part].tolist()[c.prompt_len :] == c.inference_logprobs
        assert (int(columns["seed"][i]), columns["text"][i]) == (c.seed, c.text)
    assert to_columns([])["offsets"].tolist() == [0]
