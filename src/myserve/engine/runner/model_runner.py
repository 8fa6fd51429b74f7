"""A Batch into tensors, through the model, into drawn tokens. All device work is here."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from myserve.core.isolation import failure_of, raise_if_of_the_device
from myserve.core.logprobs import Scored, prompt_logprobs
from myserve.core.params import SamplingParams
from myserve.core.rows import RowState
from myserve.core.sampling import Outcome, Sampler
from myserve.engine.batch_invariance.patch import make_exact
from myserve.engine.batch_invariance.rope_table import look_up_angles, unscaled_length
from myserve.engine.config import EngineConfig
from myserve.engine.constraints.factory import MaskAhead
from myserve.engine.memory.prefault import Reserve
from myserve.engine.mixers.attention_pass import attending
from myserve.engine.mixers.recurrent_functions import stand_before
from myserve.engine.outputs import PromptLogprob
from myserve.engine.runner.device_backend import DeviceBackend, backend_for, layer_shapes
from myserve.engine.runner.drawing import draw_tokens, drawn_positions, forced_by
from myserve.engine.runner.kv_cache import KVCache
from myserve.engine.runner.logit_rows import LogitRows, keep_rows
from myserve.engine.runner.model_structure import observe
from myserve.engine.runner.routed_experts import RoutedExperts, RoutingCapture
from myserve.engine.runner.step_result import StepResult, divided, merged
from myserve.engine.scheduling.batch import Batch, ScheduledTokens
from myserve.engine.scheduling.request import Request
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
from myserve.engine.weights.lora.adapters import Adapters

__all__ = ["ModelRunner"]


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
        mode = config.exact if packs else "off"
        stand_before(loaded.model)
        made, self.quantization = make_exact(
            loaded.model, mode=mode, reserve=reserve, quantize=loaded.quantize
        )
        if reserve is not None:  # before the cache asks how much memory is free
            reserve.give_back()
        self.structure = observe(loaded.model)
        calls, dtype = self.structure.calls, loaded.model.dtype
        self.backend = backend or backend_for(calls, dtype, loaded.device, exact=exact)
        self.settings = self.backend.settings if exact else (0,)  # for `use_rows`, in order of their cost
        self.exact_report = replace(made, mode=config.exact, attention=self.backend.attention)
        self._own_experts = experts_implementation(loaded.model)
        self.routed_experts = RoutedExperts(loaded.model)
        states = [call.state for call in self.structure.states]
        shapes = layer_shapes(calls)
        self.kv_cache = KVCache(shapes, loaded.max_model_len, dtype, self.backend, config, states)
        size = self.kv_cache.block_size
        usual = unscaled_length(loaded.model.config.get_text_config(decoder=True)) or loaded.max_model_len
        self.max_model_len = min(
            loaded.max_model_len, self.kv_cache.num_blocks * size, config.max_model_len or usual
        )
        self._max_blocks = -(-self.max_model_len // size)
        self.num_weights = loaded.num_weights
        look_up_angles(loaded.model, self.max_model_len)
        self.adapters = Adapters()
        self.use_rows(self.settings[0])
        self.sampler = Sampler()
        self._masks = MaskAhead()
        self._rows: dict[Request, RowState] = {}
        self._forced: dict[Request, tuple[int, ...]] = {}
        self._scored: dict[Request, list[PromptLogprob]] = {}
        self._alternatives: dict[Request, int] = {}  # prompt_logprobs=k of the requests that asked

    def use_rows(self, rows: int) -> None:
        """From now on every forward pass has so many rows (`fixed_rows`); 0: as many as a step has."""
        self._fixed_rows = rows
        self.adapter_steps: RecordedSteps | None = None  # those of batches with adapters, once there are any
        self.exact_report = replace(self.exact_report, fixed_rows=rows)
        if not self.backend.packs:
            use_experts(self.model, FIXED_EXPERTS if rows else self._own_experts)
        self.recorded_steps = self._no_steps_yet(rows)

    @property
    def takes_adapters(self) -> bool:
        """Return whether the linear layers are our products, which adapters are added to."""
        return self.backend.packs and self.exact_report.mode == "on"

    def forget_recordings(self, *, of_adapters_alone: bool = False) -> None:
        """Forget recorded steps: what they read has moved."""
        if not of_adapters_alone:
            self.recorded_steps.clear()
        if self.adapter_steps is not None:
            self.adapter_steps.clear()

    def _no_steps_yet(self, rows: int, *, with_adapters: bool = False) -> RecordedSteps:
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
        inputs = StepInputs.of(largest, self.kv_cache, self._max_blocks, with_adapters=with_adapters)
        return RecordedSteps(self._run_model, inputs, recorder and recorder(self.model), shapes)

    def add(self, request: Request, row: RowState, params: SamplingParams) -> None:
        """Take up a request's sampling state."""
        self._rows[request] = row
        if request.needs_prompt_logits and params.prompt_logprobs is not None:
            self._alternatives[request] = params.prompt_logprobs
            self._scored[request] = [PromptLogprob(request.prompt_token_ids[0], None)]

    def forced_of(self, request: Request) -> tuple[int, ...]:
        """Return the tokens that the request's grammar was seen to force, at its last draw."""
        return self._forced.get(request, ())

    def row_of(self, request: Request) -> RowState:
        """Return a request's sampling state."""
        return self._rows[request]

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
        self.adapters.close()
        for memory in ("model", "structure", "kv_cache", "recorded_steps", "adapter_steps", "routed_experts"):
            vars(self).pop(memory, None)  # the second time too

    @torch.inference_mode()
    def prepare_while_idle(
        self, blocks_held: int, slots_held: int = 0, is_over: Callable[[], bool] = lambda: False
    ) -> bool:
        """Do a little of what the next steps would have to: a shape recorded, some of the cache's memory touched.

        `blocks_held`, `slots_held`: that requests have held so far. Returns within milliseconds once `is_over` returns
        True. False when nothing is left to do.
        """
        recorded = self.recorded_steps.prepare(is_over)
        if self.adapter_steps is not None and not recorded:
            recorded = self.adapter_steps.prepare(is_over)
        return self.kv_cache.make_ready(blocks_held, slots_held) or recorded

    def closes_early(self, request: Request) -> bool:
        """Return whether its grammar was brought to an end for `max_tokens`."""
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
            return StepResult([[failure]] * count, [[None]] * count, {}, {request: failure}, 0.0)
        return self._score_and_draw(batch, *forwarded)

    def _forward(self, batch: Batch, *, replay: bool) -> tuple[Tensor, LogitRows, RoutingCapture]:
        wanted = self._wanted_positions(batch)
        with (
            keep_rows(self.model, self.structure.body, self._fixed_rows) as rows,
            self._capturing(batch) as captured,
        ):
            # [len(wanted), V]
            logits = self.forward(batch, wanted, replay=replay, are_read=bool(batch.draws))
        self.kv_cache.copy(batch.copies)
        return logits, rows, captured

    def _score_and_draw(
        self, batch: Batch, logits: Tensor, rows: LogitRows, captured: RoutingCapture
    ) -> StepResult:
        wanted = self._wanted_positions(batch)
        row_of = {position: row for row, position in enumerate(wanted)}
        scored, failed = self._score_prompts(batch, rows, captured)
        began = time.perf_counter()
        draws = self._draw(batch, logits, row_of)
        sampling = time.perf_counter() - began
        routing = self._routing_of_draws(batch, draws, captured)
        return StepResult(
            draws, routing, scored, failed, sampling, self._steps_of(batch.scheduled).was_typical
        )

    def forward(
        self, batch: Batch, wanted: list[int], *, replay: bool = True, are_read: bool = True
    ) -> Tensor:
        """Run the scheduled, packed; the logits [len(wanted), V] of the packed rows that are wanted.

        They may lie in memory that the next call writes again. Where they are not read, there may be none.
        """
        replay = replay and not any(self._needs_hooks(part.request) for part in batch.scheduled)
        if self._fixed_rows:
            parts = list(groups(batch.scheduled, wanted, self._fixed_rows))
            if len(parts) > 1:  # a copy of each, for they lie in the same memory
                return torch.cat([self._logits(*part, replay=replay).clone() for part in parts])
        return self._logits(batch.scheduled, wanted, replay=replay, are_read=are_read)

    def _logits(
        self,
        scheduled: Sequence[ScheduledTokens],
        wanted: Sequence[int],
        *,
        replay: bool,
        are_read: bool = True,
    ) -> Tensor:
        """Return the logits of one forward pass, recorded or not."""
        steps = self._steps_of(scheduled)
        # where nothing may be replayed, such requests take no less another time
        steps.was_typical = True
        recorded = steps.logits(scheduled, wanted, are_read=are_read) if replay else None
        if recorded is not None:
            return recorded
        if not self._fixed_rows:
            return self._run_model(StepInputs.unpadded(scheduled, wanted, self.kv_cache, self._max_blocks))
        shape = fixed_shape(self._fixed_rows, len(wanted))
        inputs = StepInputs.of(shape, self.kv_cache, self._max_blocks)
        inputs.fill(scheduled, wanted)
        return self._run_model(inputs)[: len(wanted)]

    def _steps_of(self, scheduled: Sequence[ScheduledTokens]) -> RecordedSteps:
        """Return the recorded steps that know adapters where a request has one: the others cost nothing more."""
        if all(part.request.adapter is None for part in scheduled):
            return self.recorded_steps
        if self.adapter_steps is None:
            self.adapter_steps = self._no_steps_yet(self._fixed_rows, with_adapters=True)
        return self.adapter_steps

    def _needs_hooks(self, request: Request) -> bool:
        """Return whether hooks take something from its forward pass, which a replay does not call."""
        if request in self._scored:
            return True
        return self.routed_experts.shape is not None and self._asks_routing(request)

    def _run_model(self, inputs: StepInputs) -> Tensor:
        """Logits [wanted, V]."""
        passing = self.adapters.slots.passing(inputs.adapters)
        with passing, attending(inputs.context, self.structure.calls, self.structure.states):
            out = self.model(
                input_ids=inputs.ids,
                position_ids=inputs.positions,
                use_cache=False,
                logits_to_keep=inputs.wanted,
            )
        logits: Tensor = out.logits[0]
        return logits

    def _wanted_positions(self, batch: Batch) -> list[int]:
        """Packed rows that may be drawn from."""
        if not batch.num_prefill_tokens and any(part.again for part in batch.scheduled):
            # then a step has the shape of one that verifies drafts, of fewer rows than a prompt's
            return list(range(batch.num_tokens))
        drawing = sorted({position for positions in drawn_positions(batch) for position in positions})
        return drawing or [batch.num_tokens - 1]  # a model cannot be asked for no logits

    def _capturing(self, batch: Batch) -> AbstractContextManager[RoutingCapture]:
        return self.routed_experts.capturing(
            any(self._asks_routing(part.request) for part in batch.scheduled)
        )

    def _asks_routing(self, request: Request) -> bool:
        row = self._rows.get(request)  # none: the load-time checks', which ask for nothing
        return row is not None and row.params.routed_experts

    def _routing_of_draws(
        self, batch: Batch, draws: Sequence[Sequence[Outcome]], captured: RoutingCapture
    ) -> list[list[bytes | None]]:
        """Return for each outcome the experts of the row that it was drawn from."""
        used = [positions[: len(draw)] for positions, draw in zip(drawn_positions(batch), draws, strict=True)]
        routed = iter(captured.rows([position for positions in used for position in positions]))
        asked = [self._asks_routing(request) for request, _ in batch.draws]
        return [
            [experts if asks else None for experts in islice(routed, len(positions))]
            for asks, positions in zip(asked, used, strict=True)
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
            params = self._rows[request].params
            # of row i, the token behind position first + i
            unscored = min(max(params.prompt_logprob_start - first, 0), len(targets))
            rows = logits.from_row(first - part.start + unscored)
            named = named_ids(params, first + unscored, len(targets) - unscored)
            scores = [
                *(Scored(token_id, None) for token_id in targets[:unscored]),
                *prompt_logprobs(rows, targets[unscored:], self._alternatives[request], named),
            ]
            routed: Sequence[bytes | None] = [None] * len(targets)
            if self._asks_routing(request):
                routed = captured.from_row(first - part.start).rows(range(len(targets)))
            gathered.extend(
                PromptLogprob(
                    scored.token_id,
                    scored.logprob,
                    scored.top_logprobs,
                    experts,
                    scored.rank,
                    scored.token_id_logprobs,
                )
                for scored, experts in zip(scores, routed, strict=True)
            )

    def _draw(self, batch: Batch, logits: Tensor, row_of: dict[int, int]) -> list[list[Outcome]]:
        if not batch.draws:
            return []
        rows = [self._rows[request] for request, _ in batch.draws]
        self._masks.wait()
        at_once = torch.get_num_threads() if self.device.type == "cpu" else len(logits)
        draws = draw_tokens(batch, logits, row_of, rows, self.sampler.sample, at_once)
        # now, for the masks' thread has the constraints from here on
        self._forced = {
            request: forced
            for (request, _), row in zip(batch.draws, rows, strict=True)
            if (forced := forced_by(row))
        }
        self._masks.start(row.constraint for row in rows)
        return draws


def named_ids(params: SamplingParams, first: int, count: int) -> Sequence[Sequence[int]]:
    """Return the ids to be reported with the tokens behind positions [first, first + count) of a prompt.

    >>> named_ids(SamplingParams(prompt_logprob_start=2, prompt_logprob_token_ids=((5,), (6,), (7,))), 3, 2)
    ((6,), (7,))
    """
    rows = params.prompt_logprob_token_ids
    if len(rows) > 1:
        begin = first - params.prompt_logprob_start
        return rows[begin : begin + count]
    row = rows[0] if rows else params.logprob_token_ids
    return [row] * count if row else ()
