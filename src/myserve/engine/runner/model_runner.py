"""A Batch into tensors, through the model, into drawn tokens. All device work is here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from myserve.core.isolation import failure_of, raise_if_of_the_device
from myserve.core.logprobs import prompt_logprobs
from myserve.core.params import SamplingParams
from myserve.core.rows import RowState
from myserve.core.sampling import Outcome, Sampled, Sampler
from myserve.core.transfer import upload
from myserve.engine.batch_invariance.patch import make_exact
from myserve.engine.batch_invariance.rope_table import look_up_angles, unscaled_length
from myserve.engine.config import EngineConfig
from myserve.engine.constraints.factory import MaskAhead
from myserve.engine.memory.prefault import Reserve
from myserve.engine.mixers.attention_pass import attending
from myserve.engine.outputs import PromptLogprob
from myserve.engine.runner.device_backend import DeviceBackend, backend_for, layer_shapes
from myserve.engine.runner.kv_cache import KVCache
from myserve.engine.runner.logit_rows import LogitRows, keep_rows
from myserve.engine.runner.model_structure import observe
from myserve.engine.runner.routed_experts import RoutedExperts, RoutingCapture
from myserve.engine.scheduling.request import Request
from myserve.engine.scheduling.scheduler import Batch, ScheduledTokens
from myserve.engine.steps.fixed_rows import (
    FIXED_EXPERTS,
    experts_implementation,
    fixed_shape,
    groups,
    use_experts,
)
from myserve.engine.steps.inputs import StepInputs
from myserve.engine.steps.recordings import (
    LARGEST,
    LARGEST_DECODE,
    RecordedSteps,
    Shapes,
    shape_for,
    shape_of_decode,
)
from myserve.engine.weights.loader import LoadedModel

__all__ = ["ModelRunner", "StepResult"]


@dataclass(frozen=True, slots=True)
class StepResult:
    """For each of the batch's draws, a sample or its row's error; and the prompts whose scores are done, or broke."""

    draws: list[Outcome]
    routed_experts: list[bytes | None]  # of each draw's forward pass, where its request asked
    prompt_logprobs: dict[Request, tuple[PromptLogprob, ...]]
    failed_prompts: dict[Request, Exception]
    sampling_seconds: float

    @property
    def token_ids(self) -> list[int | None]:
        """The drawn ids; None where a row failed."""
        return [draw.token_id if isinstance(draw, Sampled) else None for draw in self.draws]


class ModelRunner:
    """Runs one model. Keeps, for each live request, its sampling state, and the prompt logprobs gathered so far."""

    def __init__(
        self,
        loaded: LoadedModel,
        config: EngineConfig,
        backend: DeviceBackend | None = None,
        reserve: Reserve | None = None,
    ) -> None:
        """`backend`: how to compute; None: as the model's device asks for. `reserve`: memory for its packed weights."""
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.model = loaded.model
        self.device = loaded.device
        exact = config.exact == "on"
        packs = loaded.device.type == "cpu" if backend is None else backend.packs
        made = make_exact(loaded.model, mode=config.exact if packs else "off", reserve=reserve)
        if reserve is not None:  # before the cache asks how much memory is free
            reserve.give_back()
        self.structure = observe(loaded.model)
        calls, dtype = self.structure.calls, loaded.model.dtype
        self.backend = backend or backend_for(calls, dtype, loaded.device, exact=exact)
        self.settings = self.backend.settings if exact else (0,)  # for `use_rows`, in order of their cost
        self.exact_report = replace(made, mode=config.exact, attention=self.backend.attention)
        self._own_experts = experts_implementation(loaded.model)
        self.routed_experts = RoutedExperts(loaded.model)
        self.kv_cache = KVCache(layer_shapes(calls), loaded.max_model_len, dtype, self.backend, config)
        size = self.kv_cache.block_size
        usual = unscaled_length(loaded.model.config.get_text_config(decoder=True)) or loaded.max_model_len
        self.max_model_len = min(
            loaded.max_model_len, self.kv_cache.num_blocks * size, config.max_model_len or usual
        )
        self._max_blocks = -(-self.max_model_len // size)
        self.num_weights = loaded.num_weights
        look_up_angles(loaded.model, self.max_model_len)
        self.use_rows(self.settings[0])
        self.sampler = Sampler()
        self._masks = MaskAhead()
        self._rows: dict[Request, RowState] = {}
        self._scored: dict[Request, list[PromptLogprob]] = {}
        self._alternatives: dict[Request, int] = {}  # prompt_logprobs=k of the requests that asked

    def use_rows(self, rows: int) -> None:
        """From now on every forward pass has so many rows (`fixed_rows`); 0: as many as a step has."""
        self._fixed_rows = rows
        self.exact_report = replace(self.exact_report, fixed_rows=rows)
        if not self.backend.packs:
            use_experts(self.model, FIXED_EXPERTS if rows else self._own_experts)
        self.recorded_steps = self._no_steps_yet(rows)

    def _no_steps_yet(self, rows: int) -> RecordedSteps:
        largest = LARGEST
        shapes: Shapes = shape_for
        if rows:
            largest, shapes = fixed_shape(rows, rows), lambda _, wanted: fixed_shape(rows, wanted)
        elif not self.backend.packs:
            largest, shapes = LARGEST_DECODE, shape_of_decode
        recorder = self.backend.recorder
        # With our products an expert's tokens are chosen by looking at them, which a recording cannot.
        if self.backend.packs and (self.exact_report.mode == "off" or self.exact_report.experts):
            recorder = None
        inputs = StepInputs.of(largest, self.kv_cache, self._max_blocks)
        return RecordedSteps(self._run_model, inputs, recorder and recorder(), shapes)

    def add(self, request: Request, row: RowState, params: SamplingParams) -> None:
        """Take up a request's sampling state."""
        self._rows[request] = row
        if request.needs_prompt_logits and params.prompt_logprobs is not None:
            self._alternatives[request] = params.prompt_logprobs
            self._scored[request] = [PromptLogprob(request.prompt_token_ids[0], None)]

    def restart(self, request: Request) -> None:
        """Its prompt will be run again, by other weights: what was scored of it is void."""
        if request in self._scored:
            del self._scored[request][1:]

    def remove(self, request: Request) -> None:
        self._rows.pop(request, None)
        self._scored.pop(request, None)
        self._alternatives.pop(request, None)

    def close(self) -> None:
        """End the thread that computes masks, and let go of the weights and of the cache."""
        self._masks.close()
        for memory in ("model", "structure", "kv_cache", "recorded_steps", "routed_experts"):
            vars(self).pop(memory, None)  # the second time too

    @torch.inference_mode()
    def prepare_while_idle(self, blocks_held: int) -> bool:
        """Do a little of what the next steps would have to: a shape recorded, some of the cache's memory touched.

        `blocks_held`: blocks that requests have held so far. False when nothing is left to do.
        """
        recorded = self.recorded_steps.prepare()
        return self.kv_cache.make_ready(blocks_held) or recorded

    def closes_early(self, request: Request) -> bool:
        """Whether its grammar was brought to an end for `max_tokens`."""
        constraint = self._rows[request].constraint
        return constraint is not None and constraint.closes_early

    @torch.inference_mode()
    def run(self, batch: Batch) -> StepResult:
        """Run one packed forward, then draw for each row that is complete.

        Where the forward raises, each request's part is run alone, without replay, to learn whose the error is.
        """
        try:
            forwarded = self._forward(batch, replay=True)
        except Exception as error:
            raise_if_of_the_device(error)
            return merged(batch, [self._run_alone(part) for part in divided(batch)])
        return self._score_and_draw(batch, *forwarded)

    def _run_alone(self, batch: Batch) -> StepResult:
        """Run a batch of one request's part: keys and values written twice are the same bits."""
        try:
            forwarded = self._forward(batch, replay=False)
        except Exception as error:
            raise_if_of_the_device(error)
            failure = failure_of(error, "computing its tokens")
            count, request = len(batch.draws), batch.scheduled[0].request
            return StepResult([failure] * count, [None] * count, {}, {request: failure}, 0.0)
        return self._score_and_draw(batch, *forwarded)

    def _forward(self, batch: Batch, *, replay: bool) -> tuple[Tensor, LogitRows, RoutingCapture]:
        wanted = self._wanted_positions(batch)
        with (
            keep_rows(self.model, self.structure.body, self._fixed_rows) as rows,
            self._capturing(batch) as captured,
        ):
            logits = self.forward(batch, wanted, replay=replay)  # [len(wanted), V]
        self.kv_cache.copy(batch.copies)
        return logits, rows, captured

    def _score_and_draw(
        self, batch: Batch, logits: Tensor, rows: LogitRows, captured: RoutingCapture
    ) -> StepResult:
        wanted = self._wanted_positions(batch)
        row_of = {position: row for row, position in enumerate(wanted)}
        scored, failed = self._score_prompts(batch, rows, captured)
        drawing = _drawing_positions(batch)
        began = time.perf_counter()
        draws = self._draw(batch, logits, [row_of[position] for position in drawing])
        sampling = time.perf_counter() - began
        routed = self._routing_of_draws(batch, captured.rows(drawing))
        return StepResult(draws, routed, scored, failed, sampling)

    def forward(self, batch: Batch, wanted: list[int], *, replay: bool = True) -> Tensor:
        """Run the scheduled, packed; the logits [len(wanted), V] of the packed rows that are wanted.

        They may lie in memory that the next call writes again.
        """
        replay = replay and not any(self._needs_hooks(part.request) for part in batch.scheduled)
        if self._fixed_rows:
            parts = list(groups(batch.scheduled, wanted, self._fixed_rows))
            if len(parts) > 1:  # a copy of each, for they lie in the same memory
                return torch.cat([self._logits(*part, replay=replay).clone() for part in parts])
        return self._logits(batch.scheduled, wanted, replay=replay)

    def _logits(self, scheduled: Sequence[ScheduledTokens], wanted: Sequence[int], *, replay: bool) -> Tensor:
        """Return the logits of one forward pass, recorded or not."""
        recorded = self.recorded_steps.logits(scheduled, wanted) if replay else None
        if recorded is not None:
            return recorded
        if not self._fixed_rows:
            return self._run_model(StepInputs.unpadded(scheduled, wanted, self.kv_cache, self._max_blocks))
        shape = fixed_shape(self._fixed_rows, len(wanted))
        inputs = StepInputs.of(shape, self.kv_cache, self._max_blocks)
        inputs.fill(scheduled, wanted)
        return self._run_model(inputs)[: len(wanted)]

    def _needs_hooks(self, request: Request) -> bool:
        """Whether hooks take something from its forward pass, which a replay does not call."""
        if request in self._scored:
            return True
        return self.routed_experts.shape is not None and self._asks_routing(request)

    def _run_model(self, inputs: StepInputs) -> Tensor:
        """Logits [wanted, V]."""
        with attending(inputs.context, self.structure.calls):
            out = self.model(
                input_ids=inputs.ids,
                position_ids=inputs.positions,
                use_cache=False,
                logits_to_keep=inputs.wanted,
            )
        logits: Tensor = out.logits[0]
        return logits

    def _wanted_positions(self, batch: Batch) -> list[int]:
        """Packed rows that are drawn from: the last of each part that draws."""
        drawing = sorted(set(_drawing_positions(batch)))
        return drawing or [batch.num_tokens - 1]  # a model cannot be asked for no logits

    def _capturing(self, batch: Batch) -> AbstractContextManager[RoutingCapture]:
        return self.routed_experts.capturing(
            any(self._asks_routing(part.request) for part in batch.scheduled)
        )

    def _asks_routing(self, request: Request) -> bool:
        row = self._rows.get(request)  # none: the load-time checks', which ask for nothing
        return row is not None and row.params.routed_experts

    def _routing_of_draws(self, batch: Batch, routed: Sequence[bytes | None]) -> list[bytes | None]:
        return [
            experts if self._asks_routing(request) else None
            for (request, _), experts in zip(batch.draws, routed, strict=True)
        ]

    def _score_prompts(
        self, batch: Batch, rows: LogitRows, captured: RoutingCapture
    ) -> tuple[dict[Request, tuple[PromptLogprob, ...]], dict[Request, Exception]]:
        complete: dict[Request, tuple[PromptLogprob, ...]] = {}
        failed: dict[Request, Exception] = {}
        start = 0
        for part in batch.scheduled:
            if part.request in self._scored and part.start < part.request.num_prompt_tokens:
                try:
                    self._score_prompt(part, rows.from_row(start), captured.from_row(start))
                except Exception as error:
                    raise_if_of_the_device(error)
                    failed[part.request] = failure_of(error, "scoring its prompt")
                if len(self._scored[part.request]) == part.request.num_prompt_tokens:
                    complete[part.request] = tuple(self._scored.pop(part.request))
            start += part.count
        return complete, failed

    def _score_prompt(self, part: ScheduledTokens, logits: LogitRows, captured: RoutingCapture) -> None:
        """Score the prompt's tokens by `logits` [count, V]: row i gives the logprob of token i + 1.

        The rows behind the prompt's end score nothing.
        """
        request, gathered = part.request, self._scored[part.request]
        first = max(part.start, len(gathered) - 1)  # a preempted prompt is not scored twice
        targets = request.prompt_token_ids[first + 1 : part.start + part.count + 1]
        if targets:
            rows = logits.from_row(first - part.start)
            scores = prompt_logprobs(rows, targets, self._alternatives[request])
            routed: Sequence[bytes | None] = [None] * len(targets)
            if self._asks_routing(request):
                routed = captured.from_row(first - part.start).rows(range(len(targets)))
            gathered.extend(
                PromptLogprob(scored.token_id, scored.logprob, scored.top_logprobs, experts, scored.rank)
                for scored, experts in zip(scores, routed, strict=True)
            )

    def _draw(self, batch: Batch, logits: Tensor, picked: list[int]) -> list[Outcome]:
        if not batch.draws:
            return []
        if picked != list(range(logits.shape[0])):
            logits = logits[upload(picked, torch.int64, logits.device)]
        rows = [self._rows[request] for request, _ in batch.draws]
        self._masks.wait()
        draws = self.sampler.sample(logits, rows)  # [len(draws), V]
        for index, (row, draw) in enumerate(zip(rows, draws, strict=True)):
            if isinstance(draw, Sampled):
                try:
                    row.append(draw.token_id)
                except Exception as error:
                    draws[index] = failure_of(error, "taking in its token")
        self._masks.start(row.constraint for row in rows)
        return draws


def divided(batch: Batch) -> list[Batch]:
    """Return a batch of each scheduled part, with the draws that are made from it.

    Each makes all copies of blocks: made again, they are right once the part that filled the block has run.
    """
    parts = [Batch(copies=batch.copies) for _ in batch.scheduled]
    for alone, part in zip(parts, batch.scheduled, strict=True):
        alone.add(part)
    for request, index in batch.draws:
        parts[index].draws.append((request, 0))
    return parts


def merged(batch: Batch, results: Sequence[StepResult]) -> StepResult:
    """Return the results of `divided(batch)` as one, in the order of the batch's draws."""
    draws = [iter(zip(result.draws, result.routed_experts, strict=True)) for result in results]
    drawn = [next(draws[index]) for _, index in batch.draws]
    scored = {request: scores for result in results for request, scores in result.prompt_logprobs.items()}
    failed = {request: error for result in results for request, error in result.failed_prompts.items()}
    return StepResult(
        [draw for draw, _ in drawn],
        [routed for _, routed in drawn],
        scored,
        failed,
        sum(result.sampling_seconds for result in results),
    )


def _drawing_positions(batch: Batch) -> list[int]:
    """For each draw, the packed row that it is drawn from: the last of its part."""
    last_rows = [end - 1 for end in accumulate(part.count for part in batch.scheduled)]
    return [last_rows[part] for _, part in batch.draws]
