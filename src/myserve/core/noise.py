"""The random numbers of a draw: counter noise, a pure function, and torch noise, transformers' stream.

Both draw by the exponential race: token i arrives at time e_i / w_i, e_i ~ Exp(1), and the first one wins,
with probability w_i / sum(w). A token that a filter removed has weight 0 and never arrives; as the e_i do not
know of the weights, removing losers never changes the winner.

**counter-v1.** `philox(counter, key)` is Philox-4x32-10 (Salmon et al., SC 2011) under
    key = the 64-bit seed,   counter = (id, position, sample index, kind), 32 bits each,
so that no two draws of any two requests share a counter under one seed. Its first two words w0, w1 give the
64-bit uniform v = w0 * 2**-32 + (w1 + 1/2) * 2**-64 (rounded to float64, at most 1 - 2**-53) and E = -log(1 -
v). Ids are taken in blocks of 64. Of the iid exponentials of a block, the least is Exp(1)/64 and sits at a
uniform lane, and the others exceed it by an Exp(1) each, for an exponential has no memory. Read downwards,
that is how to make them:
    block b:  (kind 0, id b):  m_b = E / 64,  lane_b = w2 mod 64
    token i:  (kind 1, id i):  e_i = m_b if i mod 64 = lane_b else m_b + E.
The e_i are exactly iid Exp(1), and m_b / max(w in b) bounds the arrivals of a whole block from below: blocks
that cannot hold the winner are never opened, and a draw from 152k tokens hashes about 2,400 + a few times 64
counters. (Rejected: racing block sums first, which is as fast, but there a removed loser can change the
winner.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from myserve.core.mersenne.torch_state import skip_exponentials
from myserve.core.numerics import neg_log1m
from myserve.core.transfer import upload

__all__ = [
    "BLOCK",
    "COUNTER_VERSION",
    "LARGEST_UNIFORM",
    "OPENED",
    "OPENED_ON_CPU",
    "PHILOX_ROUNDS",
    "WORD",
    "CounterKey",
    "CounterNoise",
    "TorchNoise",
    "block_noise",
    "draw_counter",
    "draw_torch",
    "exponential",
    "openings",
    "philox",
    "token_noise",
]

COUNTER_VERSION = "counter-v1"
BLOCK = 64  # ids in a block
KIND_BLOCK, KIND_TOKEN = 0, 1
OPENED = 256  # blocks that a draw looks into at first: of 152k tokens, one draw in thousands needs more
OPENED_ON_CPU = 32  # where asking again costs nothing

WORD = 0xFFFFFFFF
PHILOX_ROUNDS = 10
PHILOX_M0, PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
PHILOX_W0, PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
LARGEST_UNIFORM = 1.0 - 2.0**-53

Words = tuple[Tensor, Tensor, Tensor, Tensor]


class CounterKey(NamedTuple):
    """The key of one draw's noise: the seed in two words, the position, the sample index."""

    seed_low: int
    seed_high: int
    position: int
    sample_index: int


@dataclass(frozen=True, slots=True)
class CounterNoise:
    """One completion's counter noise. It has no state: any position can be drawn at any time, in any order.

    >>> CounterNoise(seed=-1, sample_index=2).at(5)
    CounterKey(seed_low=4294967295, seed_high=4294967295, position=5, sample_index=2)
    """

    seed: int  # any int; taken modulo 2**64
    sample_index: int  # 0 <= index < 2**32

    def at(self, position: int) -> CounterKey:
        """Return the key of the token at `position`, counted from the prompt's first token."""
        # counted so, and not from the prompt's end, that a completion which is cut and sent again with the
        # tokens it has as part of its prompt goes on with the noise it would have had
        return CounterKey(self.seed & WORD, (self.seed >> 32) & WORD, position, self.sample_index)


class TorchNoise:
    """One completion's torch noise: a generator made once, never re-seeded; a draw takes V exponentials.

    Sample index 0 of seed s draws what `transformers.generate` draws after `set_seed(s)`. The other indices
    take their generators' seeds from Philox, for s + index would give two requests with neighbouring seeds
    the same samples.
    """

    def __init__(self, seed: int, sample_index: int, device: torch.device) -> None:
        self.device = device
        self.generator = torch.Generator(device=device)  # the device with its index, not its type alone
        self.generator.manual_seed(_torch_seed(seed, sample_index))

    def exponentials(self, vocab_size: int) -> Tensor:
        """The next draw's e, float32 [V]: of the whole vocabulary, tokens of weight 0 included."""
        return torch.empty(vocab_size, dtype=torch.float32, device=self.device).exponential_(
            generator=self.generator
        )

    def skip(self, draws: int, vocab_size: int) -> None:
        """Move on as if `draws` tokens had been drawn.

        On a CPU in a quarter of a second, however many they are; elsewhere by drawing them.
        """
        if draws and not skip_exponentials(self.generator, draws, vocab_size):
            for _ in range(draws):
                self.exponentials(vocab_size)


def draw_counter(
    weights: Tensor, keys: Sequence[CounterKey], opened: int | None = None
) -> tuple[Tensor, Tensor]:
    """Draw one token of each row of `weights` (float32 [R, V], none all 0): (winners int64 [R], sure bool [R]).

    An exponential race under counter noise (docs/glossary.md): each token arrives at its noise / weight, and the first
    is drawn. `opened`: how many blocks of each row are looked into, those that may hold the earliest arrivals; None:
    all. A winner is sure if it came before any block that stayed closed can have had an arrival. (Looking into just
    the blocks that may hold the winner was rejected: a GPU would have to be asked how many those are.)
    """
    R, V = weights.shape
    device = weights.device
    columns = upload(keys, torch.int64, device).unsqueeze(1)  # [R, 1, 4]
    blocks = -(-V // BLOCK)
    # ids past V are lanes of weight 0, so that noise does not depend on where the vocabulary ends
    padded = torch.nn.functional.pad(weights, (0, blocks * BLOCK - V)).double().view(R, blocks, BLOCK)
    least, lane = block_noise(torch.arange(blocks, device=device), columns)  # [R, G]
    earliest = least / padded.amax(-1)  # inf where all weights are 0
    count = blocks if opened is None else min(opened, blocks)
    order = earliest.topk(min(count + 1, blocks), largest=False)
    block = order.indices[:, :count]  # [R, N]
    ids = block.unsqueeze(2) * BLOCK + torch.arange(BLOCK, device=device)  # [R, N, 64]
    least, lane = (x.gather(1, block).unsqueeze(2) for x in (least, lane))
    inside = padded.gather(1, block.unsqueeze(2).expand(-1, -1, BLOCK))
    times = token_noise(ids, columns.unsqueeze(1), least, lane) / inside
    first = times.amin((1, 2), keepdim=True)
    winner = torch.where(times == first, ids, V).amin((1, 2))  # the lowest id, if two arrive at once
    sure = torch.ones_like(winner, dtype=torch.bool)
    if count < blocks:
        sure = order.values[:, count] > first[:, 0, 0]
    return winner, sure


def openings(device: torch.device) -> tuple[int | None, ...]:
    """Return how many blocks to look into: at first, and then for rows whose winner is not sure."""
    return (OPENED_ON_CPU, OPENED, None) if device.type == "cpu" else (OPENED, None)


def block_noise(block: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return (m_b float64, lane_b int64) of blocks, under keys whose last dimension is a `CounterKey`."""
    words = philox(
        (block, columns[..., 2], columns[..., 3], torch.full_like(block, KIND_BLOCK)),
        (columns[..., 0], columns[..., 1]),
    )
    return exponential(words) / BLOCK, words[2] % BLOCK


def token_noise(ids: Tensor, columns: Tensor, least: Tensor, lane: Tensor) -> Tensor:
    """Return e_i, float64, of tokens, given their blocks' `least` and `lane`."""
    words = philox(
        (ids, columns[..., 2], columns[..., 3], torch.full_like(ids, KIND_TOKEN)),
        (columns[..., 0], columns[..., 1]),
    )
    return torch.where(ids % BLOCK == lane, least, least + exponential(words))


def exponential(words: Words) -> Tensor:
    """Return an Exp(1) number, float64, made of the first two words."""
    uniform = words[0].double() * 2.0**-32 + (words[1].double() + 0.5) * 2.0**-64
    return neg_log1m(uniform.clamp(max=LARGEST_UNIFORM))


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> Words:
    """Return Philox-4x32-10 of int64 tensors that hold 32-bit words; all broadcast against each other.

    >>> zero = torch.zeros(1, dtype=torch.int64)
    >>> [hex(word.item()) for word in philox((zero, zero, zero, zero), (zero, zero))]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        # a product of two words fills 64 bits; as int64 it may wrap to a negative number of the same bits
        product0, product1 = x0 * PHILOX_M0, x2 * PHILOX_M1
        x0, x1, x2, x3 = (
            ((product1 >> 32) & WORD) ^ x1 ^ k0,
            product1 & WORD,
            ((product0 >> 32) & WORD) ^ x3 ^ k1,
            product0 & WORD,
        )
        k0, k1 = (k0 + PHILOX_W0) & WORD, (k1 + PHILOX_W1) & WORD
    return x0, x1, x2, x3


def draw_torch(weights: Tensor, sources: Sequence[TorchNoise]) -> Tensor:
    """Return the winners, int64 [R], of the races of `weights` (float32 [R, V]) under torch noise."""
    V = weights.shape[-1]
    e = torch.stack([source.exponentials(V) for source in sources])
    # the quotient that torch.multinomial forms, and its argmax
    return (weights / e).argmax(-1)


def _torch_seed(seed: int, sample_index: int) -> int:
    if sample_index == 0:
        return seed & (2**64 - 1)
    words = [torch.tensor(value) for value in (sample_index, 0, 0, 2, seed & WORD, (seed >> 32) & WORD)]
    high, low, _, _ = philox((words[0], words[1], words[2], words[3]), (words[4], words[5]))
    return (int(high) << 32) | int(low)
