"""counter-v1 is what its definition says, bit for bit; and torch noise is transformers' own stream."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from myserve.core.noise import (
    BLOCK,
    COUNTER_VERSION,
    OPENED,
    OPENED_ON_CPU,
    CounterKey,
    CounterNoise,
    TorchNoise,
    block_noise,
    draw_counter,
    draw_torch,
    exponential,
    philox,
    token_noise,
)

# -- an independent reading of the definition: plain Python integers and floats ---------------------------


def plain_philox(counter: tuple[int, int, int, int], seed: int) -> tuple[int, int, int, int]:
    c0, c1, c2, c3 = counter
    k0, k1 = seed % 2**32, seed // 2**32 % 2**32
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def plain_exponential(w0: int, w1: int) -> float:
    # float() of a fraction rounds once, correctly: w0 * 2**-32 + (w1 + 1/2) * 2**-64
    v = min(float(Fraction(2 * (w0 * 2**32 + w1) + 1, 2**65)), 1 - 2.0**-53)
    if v < 1 - 0.7071067811865476:
        k, s = 0, -v / (2.0 - v)
    else:
        m, k = math.frexp(1.0 - v)
        if m < 0.7071067811865476:
            m, k = m * 2.0, k - 1
        s = (m - 1.0) / (m + 1.0)
    square, poly = s * s, 1.0 / 23
    for n in range(21, 0, -2):
        poly = poly * square + 1.0 / n
    return -(k * 0.6931471805599453 + (s * 2.0) * poly)


def plain_noise(seed: int, index: int, position: int, token_id: int) -> float:
    w0, w1, w2, _ = plain_philox((token_id // 64, position, index, 0), seed % 2**64)
    least = plain_exponential(w0, w1) / 64
    if token_id % 64 == w2 % 64:
        return least
    w0, w1, _, _ = plain_philox((token_id, position, index, 1), seed % 2**64)
    return least + plain_exponential(w0, w1)


def noise(key: CounterKey, vocab_size: int, start: int = 0) -> torch.Tensor:
    """e_i of one draw from id `start` on, float64, from the tensor functions that the race is made of."""
    column = torch.tensor(key)
    ids = torch.arange(start, vocab_size)
    least, lane = block_noise(ids // BLOCK, column)
    return token_noise(ids, column, least, lane)


keys = st.builds(
    CounterKey,
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**20),
    st.integers(0, 2**32 - 1),
)


# -- golden vectors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers that the authors of Philox publish with Random123
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    x0, x1, x2, x3 = (torch.tensor(word) for word in counter)
    words = philox((x0, x1, x2, x3), (torch.tensor(key[0]), torch.tensor(key[1])))
    assert tuple(map(int, words)) == expected


GOLDEN = [  # (seed, sample index, position, token id) -> e, as float.hex()
    ((0, 0, 0, 0), "0x1.a40e5f59e32b4p-3"),
    ((0, 0, 0, 63), "0x1.6c4e35e75426ap-4"),
    ((1, 0, 0, 0), "0x1.1ad547dd8b04fp-5"),
    ((0, 1, 0, 0), "0x1.07284a4adf50ep+1"),
    ((0, 0, 1, 0), "0x1.82b53198e7edbp-2"),
    ((18446744073709551615, 4294967295, 131071, 151935), "0x1.8b4117845edc4p-1"),
    ((-1, 4294967295, 131071, 151935), "0x1.8b4117845edc4p-1"),
    ((1234, 7, 512, 50256), "0x1.090c91eef9ac2p-1"),
    ((-9223372036854775808, 0, 4095, 64), "0x1.18a256e48bb04p-1"),
    ((42, 0, 3, 14), "0x1.362812c98dbc6p-6"),  # the least of its block
]


@pytest.mark.parametrize(("address", "expected"), GOLDEN)
def test_golden_vectors(address: tuple[int, int, int, int], expected: str) -> None:
    assert COUNTER_VERSION == "counter-v1"  # other numbers are another version
    seed, index, position, token_id = address
    assert plain_noise(*address).hex() == expected
    assert noise(CounterNoise(seed, index).at(position), token_id + 1, token_id).item().hex() == expected


@given(
    seed=st.integers(-(2**63), 2**64 - 1),
    index=st.integers(0, 2**32 - 1),
    position=st.integers(0, 2**31),
    vocab_size=st.integers(1, 200),
)
@settings(max_examples=30, deadline=None)
def test_tensor_noise_is_the_plain_one_bit_for_bit(
    seed: int, index: int, position: int, vocab_size: int
) -> None:
    ours = noise(CounterNoise(seed, index).at(position), vocab_size).tolist()
    assert ours == [plain_noise(seed, index, position, token_id) for token_id in range(vocab_size)]


# -- what the noise is ------------------------------------------------------------------------------------


def test_it_is_exponential_and_independent_within_a_block() -> None:
    # rows: 4,000 draws of block 0; the law of one lane, of the least, of sums, and of pairs of lanes
    columns = torch.tensor([[7, 0, position, 0] for position in range(4000)]).unsqueeze(1)
    ids = torch.arange(BLOCK).unsqueeze(0)
    least, lane = block_noise(ids // BLOCK, columns)
    e = token_noise(ids, columns, least, lane)  # [4000, 64]
    uniform = torch.exp(-e).sort(dim=0).values
    steps = torch.linspace(0, 1, 4000, dtype=torch.float64).unsqueeze(1)
    assert (uniform - steps).abs().max() < 2.2 / 4000**0.5  # Kolmogorov and Smirnov's, over 64 lanes
    standard = e - 1.0
    covariance = standard.T @ standard / 4000
    off_diagonal = covariance - torch.diag(covariance.diag())
    assert off_diagonal.abs().max() < 5.0 / 4000**0.5
    assert (e.argmin(1).bincount(minlength=BLOCK) - 62.5).abs().max() < 5 * 62.5**0.5
    assert abs(e.mean() - 1.0) < 0.01
    # the control: had the least been added to every lane, all would be late by 1/64
    assert abs((e + least).mean() - 1.0) > 0.01


def test_the_tail_is_exact_to_the_64th_bit() -> None:
    def e(w0: int, w1: int) -> float:
        word = torch.tensor(0)
        return exponential((torch.tensor(w0), torch.tensor(w1), word, word)).item()

    assert e(0, 0) == 2.0**-65
    assert e(0, 1) == 3 * 2.0**-65  # a 24- or 53-bit uniform cannot tell these two apart
    assert e(1, 0) == pytest.approx(2.0**-32, rel=1e-9)
    assert e(2**32 - 1, 2**32 - 1) == pytest.approx(53 * math.log(2))
    assert e(2**31, 0) == pytest.approx(math.log(2), rel=1e-15)


def test_neighbours_do_not_collide_and_are_no_shifted_windows() -> None:
    def window(seed: int, index: int, position: int) -> list[float]:
        return noise(CounterNoise(seed, index).at(position), 130).tolist()

    base = set(window(10, 1, 5))
    for other in [(11, 0, 5), (11, 1, 5), (9, 2, 5), (10, 2, 4), (10, 0, 6), (10 + 2**32, 1, 5), (-10, 1, 5)]:
        assert not base & set(window(*other)), other
    # the control: keys that are added up collide where seed + index are equal
    assert CounterNoise(10 + 1, 0).at(5) == CounterNoise(11 + 0, 0).at(5)


def test_seed_is_taken_modulo_two_to_the_64() -> None:
    assert CounterNoise(-1, 0).at(0) == CounterNoise(2**64 - 1, 0).at(0)


# -- the race ---------------------------------------------------------------------------------------------

weights_and_keys = st.integers(1, 400).flatmap(
    lambda vocab: st.tuples(
        st.lists(keys, min_size=1, max_size=4), st.integers(0, 2**32 - 1), st.just(vocab), st.floats(0, 30)
    )
)


def some_weights(rows: int, vocab: int, seed: int, spread: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.exp(-spread * torch.rand(rows, vocab, generator=generator))
    weights[torch.rand(rows, vocab, generator=generator) < 0.3] = 0.0
    weights[:, seed % vocab] = 1.0
    return weights


@given(weights_and_keys)
@settings(max_examples=60, deadline=None)
def test_opening_few_blocks_finds_the_winner_of_the_whole_race(
    case: tuple[list[CounterKey], int, int, float],
) -> None:
    race_keys, seed, vocab, spread = case
    weights = some_weights(len(race_keys), vocab, seed, spread)
    whole = [
        (noise(key, vocab) / w.double()).argmin().item() for key, w in zip(race_keys, weights, strict=True)
    ]
    for opened in (None, OPENED, OPENED_ON_CPU, 1):
        winners, sure = draw_counter(weights, race_keys, opened)
        assert [w for w, known in zip(winners.tolist(), sure.tolist(), strict=True) if known] == [
            w for w, known in zip(whole, sure.tolist(), strict=True) if known
        ]
        assert opened is not None or sure.all()


def test_a_draw_that_opened_too_few_blocks_says_so() -> None:
    weights = some_weights(64, 5_000, 0, 4.0)
    race_keys = [CounterKey(7, 8, position, 0) for position in range(64)]
    few, many = (draw_counter(weights, race_keys, opened)[1] for opened in (1, OPENED))
    assert few.any() and not few.all() and many.all()


@given(weights_and_keys, st.integers(1, 200), st.floats(1e-3, 1.0))
@settings(max_examples=60, deadline=None)
def test_a_draw_does_not_depend_on_removed_losers_scale_or_vocabulary(
    case: tuple[list[CounterKey], int, int, float], more: int, scale: float
) -> None:
    race_keys, seed, vocab, spread = case
    weights = some_weights(len(race_keys), vocab, seed, spread)
    winners = draw_counter(weights, race_keys)[0]
    fewer = torch.where(torch.rand(weights.shape) < 0.7, 0.0, weights)
    fewer.scatter_(1, winners.unsqueeze(1), weights.gather(1, winners.unsqueeze(1)))
    assert torch.equal(draw_counter(fewer, race_keys)[0], winners)
    longer = torch.cat((weights, torch.zeros(len(race_keys), more)), dim=1)
    assert torch.equal(draw_counter(longer, race_keys)[0], winners)
    assert torch.equal(draw_counter(weights * 2.0 ** round(math.log2(scale)), race_keys)[0], winners)


def test_a_race_of_block_sums_would_depend_on_removed_losers() -> None:
    """The control of the test above: the scheme that was rejected fails it."""

    def race_of_sums(weights: torch.Tensor, position: int) -> int:
        e = noise(CounterKey(1, 2, position, 0), 2 * BLOCK)
        sums = weights.view(2, BLOCK).sum(1)
        block = int((e[:2] / sums).argmin())
        inside = slice(block * BLOCK, (block + 1) * BLOCK)
        return block * BLOCK + int((e[inside] / weights[inside]).argmin())

    weights = torch.ones(2 * BLOCK)
    changed = 0
    for position in range(50):
        winner = race_of_sums(weights, position)
        fewer = torch.zeros_like(weights)
        fewer[winner] = 1.0
        fewer[BLOCK * (winner < BLOCK) : BLOCK * (winner < BLOCK) + BLOCK] = 1.0
        changed += race_of_sums(fewer, position) != winner
    assert changed > 0


# -- torch noise ------------------------------------------------------------------------------------------


def test_torch_noise_is_multinomials_own_stream() -> None:
    probabilities = torch.softmax(torch.randn(1, 500, generator=torch.Generator().manual_seed(1)), -1)
    torch.manual_seed(2**64 - 3)
    theirs = [torch.multinomial(probabilities, 1).item() for _ in range(30)]
    source = TorchNoise(-3, 0, torch.device("cpu"))
    assert [draw_torch(probabilities, [source]).item() for _ in range(30)] == theirs


def test_torch_noise_skips_what_was_drawn() -> None:
    drawn, skipped = (TorchNoise(5, 3, torch.device("cpu")) for _ in range(2))
    for _ in range(7):
        drawn.exponentials(50)
    skipped.skip(7, 50)
    assert torch.equal(drawn.exponentials(50), skipped.exponentials(50))


def test_torch_noise_of_neighbouring_seeds_and_indices_differs() -> None:
    streams = {
        tuple(TorchNoise(seed, index, torch.device("cpu")).exponentials(4).tolist())
        for seed in range(8)
        for index in range(8)
    }
    assert len(streams) == 64
