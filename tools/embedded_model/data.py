"""The training text: drawn from our own tasks by one seed, tokenized, packed into rows of documents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from myserve.embedded import arithmetic
from tools.embedded_model import talk
from tools.embedded_model.tokenizer import END_OF_TEXT, IM_END, IM_START

Message = dict[str, str]
IGNORED = -100  # a label that carries no loss, torch's own word for it
_OPEN_ROWS = 32  # rows that packing fills at once: 97 % full; one at a time leaves a sixth empty

# How often a task is drawn. Two-digit sums get enough to be learned to 60-90 %, not to 100 %.
_TASKS: tuple[tuple[float, Callable[[Random], talk.Turn]], ...] = (
    (9.5, arithmetic.two_digit_sum),
    (8.0, arithmetic.one_digit_sum),
    (3.0, arithmetic.one_digit_difference),
    (3.0, arithmetic.larger_number),
    (7.0, talk.counting),
    (8.0, talk.repetition),
    (7.0, talk.fact),
    (6.0, talk.small_talk),
    (5.0, talk.calendar),
    (4.0, talk.spelling),
    (3.0, talk.opposite),
    (3.0, talk.too_hard),
    (2.0, talk.greeting),
    (2.0, talk.color),
    (2.0, talk.story),
    (1.5, talk.haiku),
    (1.0, talk.emoji_meaning),
)
_WEIGHTS = [weight for weight, _ in _TASKS]
_DRAWS = [draw for _, draw in _TASKS]


@dataclass(frozen=True, slots=True)
class Document:
    """Token ids and, for each, the label at that place: the id itself where it is learned, else IGNORED."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Whole documents side by side; each [B, T]. `document` tells them apart, -1 is padding."""

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    document: Tensor


def draw_chat(rng: Random) -> list[Message]:
    """Draw one chat, ready for a template: mostly one turn, sometimes several, sometimes with a system prompt."""
    chance = rng.random()
    if chance < 0.02:
        return _as_messages([talk.pirate_greeting(rng)], system=rng.choice(talk.PIRATE_PROMPTS))
    system = rng.choice(talk.SYSTEM_PROMPTS) if rng.random() < 0.1 else None
    if chance < 0.05:
        return _as_messages(talk.introduction(rng), system)
    turns = 1 if rng.random() < 0.85 else rng.randint(2, 3)
    return _as_messages([_draw_turn(rng) for _ in range(turns)], system)


def draw_text(rng: Random) -> str:
    """Draw a document without roles, for plain completion: a sum, or an answer long enough to stand by itself."""
    while True:
        question, answer = _draw_turn(rng)
        if question.endswith("="):
            return question + answer
        if len(answer) > 40:
            return answer


def render_chat(messages: Sequence[Message]) -> str:
    """Render as the chat template does without a generation prompt; 40 times faster than Jinja over the corpus.

    >>> render_chat([{"role": "user", "content": "hi"}])
    '<|im_start|>user\\nhi<|im_end|>\\n'
    """
    return "".join(f"{IM_START}{m['role']}\n{m['content']}{IM_END}\n" for m in messages)


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of each text; markers in it are read as the special tokens that they spell."""
    ids: list[list[int]] = tokenizer(list(texts)).data["input_ids"]
    return ids


def encode_prompt(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """Return the ids of one user turn and the opening of the answer, by the model's own chat template."""
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return encode(tokenizer, [str(text)])[0]


def encode_documents(tokenizer: PreTrainedTokenizerBase, seed: int, count: int) -> list[Document]:
    """Return `count` documents: chats, learned on the answers; one in twenty is plain text, learned whole."""
    rng = Random(seed)
    texts = [
        draw_text(rng) + END_OF_TEXT if rng.random() < 0.05 else render_chat(draw_chat(rng))
        for _ in range(count)
    ]
    (header,) = encode(tokenizer, [f"{IM_START}assistant\n"])
    end = tokenizer.get_vocab()[IM_END]
    return [Document(ids, _labels(ids, header, end)) for ids in encode(tokenizer, texts)]


def pack_rows(documents: Sequence[Document], row_length: int) -> PackedRows:
    """Fill rows of `row_length` tokens with whole documents; one longer than a row is left out."""
    rows: list[list[Document]] = []
    free: dict[int, int] = {}  # open rows: row -> tokens left
    for document in documents:
        size = len(document.input_ids)
        if size > row_length:
            continue
        row = next((row for row, left in free.items() if left >= size), len(rows))
        if row == len(rows):
            rows.append([])
            free[row] = row_length
            if len(free) > _OPEN_ROWS:
                del free[min(free, key=free.__getitem__)]
        rows[row].append(document)
        free[row] -= size
    return as_tensors(rows, row_length)


def as_tensors(rows: Sequence[Sequence[Document]], row_length: int) -> PackedRows:
    """Rows of documents as tensors [B, row_length], padded on the right."""
    shape = (len(rows), row_length)
    packed = PackedRows(*(torch.full(shape, fill) for fill in (0, IGNORED, 0, -1)))
    for row, members in enumerate(rows):
        end = 0
        for index, document in enumerate(members):
            at, end = end, end + len(document.input_ids)
            packed.input_ids[row, at:end] = torch.tensor(document.input_ids)
            packed.labels[row, at:end] = torch.tensor(document.labels)
            packed.position_ids[row, at:end] = torch.arange(end - at)
            packed.document[row, at:end] = index
    return packed


def batches(rows: PackedRows, batch_rows: int, seed: int) -> Iterator[PackedRows]:
    """Yield the rows once, shuffled by `seed`, `batch_rows` at a time; a short last batch is dropped."""
    order = torch.randperm(len(rows.input_ids), generator=torch.Generator().manual_seed(seed))
    for take in torch.split(order, batch_rows):
        if len(take) == batch_rows:
            yield PackedRows(
                rows.input_ids[take], rows.labels[take], rows.position_ids[take], rows.document[take]
            )


def _draw_turn(rng: Random) -> talk.Turn:
    (draw,) = rng.choices(_DRAWS, _WEIGHTS)
    question, answer = draw(rng)
    if draw is not talk.repetition and rng.random() < 0.15:
        question = question.lower().rstrip(".!?:")  # people type like that
    return question, answer


def _as_messages(turns: Sequence[talk.Turn], system: str | None = None) -> list[Message]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def _labels(ids: list[int], header: list[int], end: int) -> list[int]:
    """Return labels: ids from each assistant header to its <|im_end|>, included; all ids of a text without roles."""
    if ids[0] != header[0]:
        return ids
    labels = [IGNORED] * len(ids)
    learned = False
    for at, token in enumerate(ids):
        if learned:
            labels[at] = token
            learned = token != end
        else:
            learned = ids[max(0, at + 1 - len(header)) : at + 1] == header
    return labels
