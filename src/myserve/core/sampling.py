"""From logits to tokens: the batched `Sampler` for rows with nothing in common, and `sample_next`.

Law: what a row gets depends on its logits and its RowState alone. Rows are put side by side only where the
arithmetic is known to treat each as if it were alone (`numerics`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from myserve.core.batched.behaviour import scale, truncate
from myserve.core.batched.edits import ScoreScratch, edit
from myserve.core.batched.reports import Reports
from myserve.core.batched.trace import asked_waterfalls, trace
from myserve.core.compiled import fast_path
from myserve.core.isolation import failure_of, raise_if_of_the_device
from myserve.core.logprobs import Kept, Normaliser, TopLogprobs, masses, normalisers_of, ranks
from myserve.core.noise import draw_counter, draw_torch, openings
from myserve.core.numerics import log_mass, quanta, weights_of
from myserve.core.params import SamplingParams
from myserve.core.rows import RowState
from myserve.core.stages import entropy_of
from myserve.core.transfer import download, upload
from myserve.core.waterfall import Waterfall
from myserve.errors import ConstraintError, NonFiniteLogitsError, RequestFailedError

__all__ = [
    "RowState",
    "Sampled",
    "Sampler",
    "SamplerCfg",
    "SamplingParams",
    "apply_penalties",
    "sample_next",
    "top_k_top_p_filter",
]


@dataclass(frozen=True, slots=True)
class Sampled:
    """One drawn token with every number that belongs to it."""

    token_id: int
    logprob: float  # of the model's own distribution: log-softmax of the raw logits
    sampling_logprob: float  # of the distribution that the draw used
    top_logprobs: TopLogprobs = ()  # (id, logprob), best first, of the distribution that logprobs_mode names
    # for logprob_token_ids; None: out of the support
    token_id_logprobs: tuple[tuple[int, float | None], ...] = ()
    kept: Kept | None = None
    rank: int | None = None  # among all ids by the raw logits; of equals the lower id comes first
    entropy: float | None = None  # nats, of the raw logits
    waterfall: Waterfall | None = None


Outcome = Sampled | Exception
"""What a row gets: a token, or the error that ended it."""


class Sampler:
    """Draws one token a row, each under its own parameters, noise and history.

    `compiled=False` keeps to tensor operations, as other devices than the CPU do: the same bits, more slowly.

    >>> params = SamplingParams(temperature=0.0)
    >>> row = RowState(params, seed=0, sample_index=0, prompt_token_ids=[0], vocab_size=3, eos_token_ids=[])
    >>> drawn, = Sampler().sample(torch.tensor([[0.0, 1.0, 1.0]]), [row])
    >>> drawn.token_id, drawn.logprob, drawn.sampling_logprob
    (1, -0.8619948029518127, 0.0)
    """

    def __init__(self, *, compiled: bool = True) -> None:
        self._compiled = compiled and fast_path.available()
        self._raw, self._edited = ScoreScratch(), ScoreScratch()

    @torch.inference_mode()
    def sample(
        self, logits: Tensor, rows: Sequence[RowState], places: Sequence[int] | None = None
    ) -> list[Outcome]:
        """Draw from `logits` [B, V] (raw, any float dtype), row b under `rows[b]`; append nothing to them.

        `places`: where in `logits` each row's scores are; None: in order.

        A row whose logits hold NaN or +inf, or whose constraints forbid every token, gets an error in its
        place, and so does one for which any part of the sampler raises: the others keep their bits.
        """
        raw = logits.detach()
        if self._reads_in_place(raw, rows):
            try:
                return _draw_compiled(raw, raw, rows, places)
            except Exception as error:
                raise_if_of_the_device(error)
        raw = _at(raw, places)
        if raw.dtype != torch.float32 or not raw.is_contiguous():
            raw = self._raw.copy(raw)
        try:
            return self._sample(raw, rows)
        except Exception as error:
            raise_if_of_the_device(error)
            return self._sample_apart(raw, rows)

    def _reads_in_place(self, raw: Tensor, rows: Sequence[RowState]) -> bool:
        """Return whether compiled code draws from the scores where they are, for nothing else looks at them."""
        readable = raw.dtype in (torch.float32, torch.bfloat16) and raw.device.type == "cpu"
        return self._compiled and readable and raw.is_contiguous() and all(map(fast_path.is_alone, rows))

    def _sample_apart(self, raw: Tensor, rows: Sequence[RowState]) -> list[Outcome]:
        """Draw for each row as if it were alone, which changes no bit of it, to learn whose the error is."""
        outcomes: list[Outcome] = []
        for b, row in enumerate(rows):
            row.restore_noise()
            try:
                outcomes += self._sample(raw[b : b + 1], [row])
            except Exception as error:
                raise_if_of_the_device(error)
                outcomes.append(failure_of(error, "drawing its next token"))
        return outcomes

    def _sample(self, raw: Tensor, rows: Sequence[RowState]) -> list[Outcome]:
        edited = edit(raw, rows, self._edited)
        outcomes: dict[int, Outcome] = {}
        waterfalls = asked_waterfalls(rows)
        for draw, places in self._divide(rows, raw.device):
            # indexing copies a vocabulary a row: not when a part is the whole
            part = (raw, edited) if len(places) == len(rows) else (raw[places], edited[places])
            outcomes.update(zip(places, draw(*part, [rows[b] for b in places]), strict=True))
        self._add_ranks(raw, rows, outcomes)
        self._add_entropies(raw, rows, outcomes)
        for b, asked in waterfalls.items():
            outcome = outcomes[b]
            if isinstance(outcome, Sampled):
                outcomes[b] = replace(outcome, waterfall=trace(raw[b : b + 1], rows[b], *asked))
        return [outcomes[b] for b in range(len(rows))]

    @staticmethod
    def _add_ranks(raw: Tensor, rows: Sequence[RowState], outcomes: dict[int, Outcome]) -> None:
        """Count the scores above those of the tokens whose rank is asked for: [asked, V]."""
        asked = {
            b: drawn for b, drawn in outcomes.items() if rows[b].params.ranks and isinstance(drawn, Sampled)
        }
        if not asked:
            return
        places = upload(list(asked), torch.int64, raw.device)
        ids = upload([drawn.token_id for drawn in asked.values()], torch.int64, raw.device).unsqueeze(1)
        scores = raw[places]
        for (b, drawn), rank in zip(asked.items(), ranks(scores, scores.gather(1, ids), ids), strict=True):
            outcomes[b] = replace(drawn, rank=rank)

    @staticmethod
    def _add_entropies(raw: Tensor, rows: Sequence[RowState], outcomes: dict[int, Outcome]) -> None:
        asked = [b for b, row in enumerate(rows) if row.params.entropies and isinstance(outcomes[b], Sampled)]
        if not asked:
            return
        scores = raw[upload(asked, torch.int64, raw.device)]
        largest, weights = weights_of(scores)
        total = quanta(weights).sum(-1, keepdim=True)
        for b, entropy in zip(asked, entropy_of(largest, scores, weights, total)[:, 0].tolist(), strict=True):
            outcomes[b] = replace(outcomes[b], entropy=entropy)  # type: ignore[type-var]  # a Sampled

    def _divide(self, rows: Sequence[RowState], device: torch.device) -> list[tuple[Draw, list[int]]]:
        """Return each way of drawing with the rows that take it."""
        quick = self._compiled and device.type == "cpu"
        known = [b for b, row in enumerate(rows) if quick and fast_path.knows(row)]
        others = sorted(set(range(len(rows))) - set(known))
        ways: list[tuple[Draw, list[int]]] = [(_draw_compiled, known), (_draw_tensors, others)]
        return [(draw, places) for draw, places in ways if places]


def _at(scores: Tensor, places: Sequence[int] | None) -> Tensor:
    """Return the scores at these places; a view where they lie behind one another, for indexing copies them."""
    if places is None:
        return scores
    first, count = places[0], len(places)
    if list(places) == list(range(first, first + count)):
        return scores[first : first + count]
    return scores[upload(places, torch.int64, scores.device)]


Draw = Callable[[Tensor, Tensor, list[RowState]], list[Outcome]]


def _draw_compiled(
    raw: Tensor, edited: Tensor, rows: Sequence[RowState], places: Sequence[int] | None = None
) -> list[Outcome]:
    drawn = fast_path.draw(raw, edited, rows, places)
    raw_norms = [
        Normaliser(top, log_mass(mass)) for top, mass in zip(drawn.raw_largest, drawn.raw_mass, strict=True)
    ]
    # reports of what the compiled draw knows need the raw scores alone
    asked = Reports(raw, raw, raw, [row.params for row in rows])
    reports = asked.written(asked.tensors, raw_norms, raw_norms)
    return [
        _row_error(raw_norm.largest, largest, token_id >= 0, row)
        or Sampled(
            token_id,
            raw_norm.logprob(raw_score),
            Normaliser(largest, log_mass(mass)).logprob(score),
            *report,
        )
        for row, token_id, raw_norm, raw_score, largest, mass, score, report in zip(
            rows,
            drawn.tokens,
            raw_norms,
            drawn.raw_score,
            drawn.largest,
            drawn.mass,
            drawn.score,
            reports,
            strict=True,
        )
    ]


def _draw_tensors(raw: Tensor, edited: Tensor, rows: list[RowState]) -> list[Outcome]:
    """Everything that a row is told comes from the device in one transfer, its errors too."""
    params = [row.params for row in rows]
    # a maximum is NaN if any score is, and +inf if any score is
    tops = torch.stack((raw.amax(-1), edited.amax(-1)))  # [2, B]
    raw, edited = _with_something_to_draw(raw, edited, tops.isfinite().all(0))
    scaled = scale(edited, params)
    behaviour = truncate(scaled, params)
    raw_mass = masses(raw)
    mass = raw_mass if behaviour is raw else masses(behaviour)
    asked = Reports(raw, scaled, behaviour, params)
    race, unsure = _Race(behaviour, rows), list(range(len(rows)))
    for opened in openings(raw.device):
        tokens, sure = race.tokens(unsure, opened)
        # V where there is no winner: the score there is then -inf, and no device reads behind the end
        tokens = tokens.clamp(max=raw.shape[1] - 1)
        scores = [x.gather(1, tokens.unsqueeze(1))[:, 0] for x in (raw, behaviour)]
        got = download([tops, tokens, sure, *scores, *raw_mass, *mass, *asked.tensors])
        unsure = [b for b, known in enumerate(got[2].tolist()) if not known]
        if not unsure:
            break
    raw_norms, norms = normalisers_of(*got[5:7]), normalisers_of(*got[7:9])
    reports = asked.written(got[9:], raw_norms, norms)
    columns = zip(*got[0].tolist(), rows, *(x.tolist() for x in (got[1], *got[3:5])), strict=True)
    return [
        _row_error(raw_top, top, math.isfinite(score), row)
        or Sampled(token_id, raw_norm.logprob(raw_score), norm.logprob(score), *report)
        for (raw_top, top, row, token_id, raw_score, score), raw_norm, norm, report in zip(
            columns, raw_norms, norms, reports, strict=True
        )
    ]


def _with_something_to_draw(raw: Tensor, edited: Tensor, sound: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that will fail become rows of zeros: which those are is not known on the host yet."""
    column = sound.unsqueeze(1)
    zeroed = raw.where(column, 0.0)
    return zeroed, zeroed if edited is raw else edited.where(column, 0.0)


def _row_error(
    raw_largest: float, edited_largest: float, has_token: bool, row: RowState
) -> NonFiniteLogitsError | ConstraintError | RequestFailedError | None:
    """Return why a row can draw nothing: by the maxima before and after stages 1 to 4, and whether the race was won."""
    position = row.position
    if not math.isfinite(raw_largest):
        return NonFiniteLogitsError(
            f"the model's logits for position {position} are not finite (their maximum is {raw_largest}); "
            "this completion cannot go on"
        )
    if row.constraint is not None and row.constraint.error is not None:
        return ConstraintError(f"the grammar cannot go on: {row.constraint.error}", param="grammar")
    if math.isnan(edited_largest) or edited_largest == math.inf:
        return ConstraintError(
            f"the penalties and logit_bias give no finite score for position {position}; bring them nearer to 0 "
            "(repetition_penalty: to 1)"
        )
    if not math.isfinite(edited_largest):
        return ConstraintError(
            f"no token is left to draw for position {position}: the grammar, allowed_token_ids, bad_words_ids and "
            "min_tokens together forbid every one; loosen one of them"
        )
    if not has_token:
        return RequestFailedError(
            f"the stages of truncation left no token to draw for position {position}: an error of this server"
        )
    return None


class _Race:
    """The token that each row draws; what a generator gives is drawn once, however often one looks."""

    def __init__(self, behaviour: Tensor, rows: list[RowState]) -> None:
        _, self._weights = weights_of(behaviour)
        self._device = behaviour.device
        self._keys = {b: row.counter_key for b, row in enumerate(rows) if row.torch_noise is None}
        self._tokens = torch.zeros(len(rows), dtype=torch.int64, device=self._device)
        self._sure = torch.ones_like(self._tokens, dtype=torch.bool)
        if sources := {b: row.torch_noise for b, row in enumerate(rows) if row.torch_noise is not None}:
            at = self._at(list(sources))
            self._tokens[at] = draw_torch(self._weights[at], list(sources.values()))

    def tokens(self, rows: list[int], opened: int | None) -> tuple[Tensor, Tensor]:
        """(tokens, whether each is sure) [B], after looking into so many blocks of these rows, if they have any."""
        looked = [b for b in rows if b in self._keys]
        if looked:
            at = self._at(looked)
            weights = self._weights if len(looked) == len(self._weights) else self._weights[at]
            drawn = draw_counter(weights, [self._keys[b] for b in looked], opened)
            self._tokens[at], self._sure[at] = drawn
        return self._tokens, self._sure

    def _at(self, rows: list[int]) -> Tensor:
        return upload(rows, torch.int64, self._device)


# -- the surface of the original specification (docs/specification.md) ---------------------------------------


@dataclass
class SamplerCfg:
    """One configuration for a whole batch: the original specification's small twin of `SamplingParams`.

    >>> SamplerCfg(temperature=0.7, top_p=0.9).top_k is None
    True
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        self.params()

    def params(self) -> SamplingParams:
        """Return this as `SamplingParams`, which validates it."""
        return SamplingParams(**vars(self))


@torch.no_grad()
def apply_penalties(
    logits: Tensor,  # [B, V]
    generated_ids: Tensor,  # [B, T]
    presence_penalty: float,
    frequency_penalty: float,
) -> Tensor:
    """z - f * count - p * [count > 0] over the ids it is given: the completion, without the prompt.

    >>> apply_penalties(torch.zeros(1, 3), torch.tensor([[2, 2]]), 0.5, 1.0)
    tensor([[ 0.0000,  0.0000, -2.5000]])
    """
    if presence_penalty == 0.0 and frequency_penalty == 0.0:
        return logits
    V = logits.shape[-1]
    known = (generated_ids >= 0) & (generated_ids < V)
    counts = torch.zeros_like(logits, dtype=torch.float32)
    counts.scatter_add_(1, generated_ids.clamp(0, V - 1), known.to(torch.float32))
    return logits.to(torch.float32) - frequency_penalty * counts - presence_penalty * (counts > 0)


@torch.no_grad()
def top_k_top_p_filter(logits: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """`logits` [B, V] as float32 with -inf for what top-k, then top-p remove.

    >>> top_k_top_p_filter(torch.tensor([[3.0, 1.0, 2.0]]), 2, 1.0)
    tensor([[3., -inf, 2.]])
    """
    params = SamplingParams(top_k=top_k, top_p=top_p)
    return truncate(logits.to(torch.float32), [params] * logits.shape[0])


@torch.no_grad()
def sample_next(
    logits: Tensor,  # [B, V] of the last step
    cfg: SamplerCfg,
    generated_ids: Tensor,  # [B, T] what the penalties count: the completion so far
    gen: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(next ids [B], their logprobs [B], all logprobs [B, V]) of the behaviour distribution; torch noise.

    One generator serves the whole batch, as in `transformers.generate`; None is torch's global one. At
    temperature 0 it takes the largest score, and the logprobs are those of the distribution before the choice
    (T = 1).
    """
    logits = apply_penalties(
        logits.to(torch.float32), generated_ids, cfg.presence_penalty, cfg.frequency_penalty
    )
    if cfg.temperature == 0.0:
        logprobs = F.log_softmax(logits, dim=-1)
        next_ids = logits.argmax(-1, keepdim=True)
    else:
        params = [cfg.params()] * logits.shape[0]
        behaviour = truncate(scale(logits, params), params)
        logprobs = F.log_softmax(behaviour, dim=-1)
        next_ids = torch.multinomial(F.softmax(behaviour, dim=-1), num_samples=1, generator=gen)
    return next_ids.squeeze(-1), logprobs.gather(-1, next_ids).squeeze(-1), logprobs
