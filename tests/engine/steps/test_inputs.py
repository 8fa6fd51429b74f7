"""A step's inputs, number by number: packed rows, slots in scattered blocks, padding that is not kept."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from myserve.engine.scheduling.batch import ScheduledTokens
from myserve.engine.scheduling.request import Request
from myserve.engine.steps.inputs import Shape, StepInputs

SIZE = 4


@dataclass
class Cache:
    layers: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    block_size: int = SIZE
    pages: None = None
    states: tuple[torch.Tensor, ...] = ()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


def scheduled() -> list[ScheduledTokens]:
    """A decode at position 5 on blocks 7 and 2, and a prompt's tokens 3 to 5 on blocks 1 and 9."""
    decode = Request("a", [10, 11, 12, 13, 14, 15], max_tokens=4)
    decode.block_table = [7, 2]
    prompt = Request("b", [20, 21, 22, 23, 24, 25, 26], max_tokens=4)
    prompt.block_table = [1, 9]
    return [ScheduledTokens(decode, 5, 1), ScheduledTokens(prompt, 3, 3)]


def check(inputs: StepInputs) -> None:
    context = inputs.context
    assert inputs.ids[0, :4].tolist() == [15, 23, 24, 25]
    assert inputs.positions[0, :4].tolist() == [5, 3, 4, 5]
    assert context.slot_mapping[:4].tolist() == [2 * SIZE + 1, 1 * SIZE + 3, 9 * SIZE, 9 * SIZE + 1]
    assert context.query_start[:3].tolist() == [0, 1, 4]
    assert context.context_lens[:2].tolist() == [6, 6]
    assert context.block_tables[:2, :2].tolist() == [[7, 2], [1, 9]]
    assert inputs.wanted[:2].tolist() == [0, 3]


def test_unpadded_inputs_are_of_exactly_this_step() -> None:
    inputs = StepInputs.unpadded(scheduled(), [0, 3], Cache(), max_blocks=16)
    check(inputs)
    assert inputs.ids.shape == (1, 4) and inputs.context.block_tables.shape == (2, 2)


def test_room_that_is_left_is_padding_that_no_block_keeps() -> None:
    inputs = StepInputs.of(Shape(rows=6, requests=4, wanted=3), Cache(), max_blocks=8)
    for tensor in (inputs.ids, inputs.positions, inputs.context.slot_mapping, inputs.wanted):
        tensor.fill_(99)  # of an earlier step
    inputs.context.context_lens.fill_(99)
    inputs.fill(scheduled(), [0, 3])
    check(inputs)
    assert inputs.context.slot_mapping[4:].tolist() == [-1, -1]
    assert inputs.ids[0, 4:].tolist() == inputs.positions[0, 4:].tolist() == [0, 0]
    assert inputs.context.query_start.tolist() == [0, 1, 4, 4, 4]
    assert inputs.context.context_lens[2:].tolist() == [0, 0]
    assert inputs.wanted[2:].tolist() == [0]


def test_a_cut_is_a_view_of_the_same_memory() -> None:
    whole = StepInputs.of(Shape(rows=8, requests=4, wanted=4), Cache(), max_blocks=8)
    part = whole.cut(Shape(rows=4, requests=2, wanted=2))
    part.fill(scheduled(), [0, 3])
    check(part)
    assert whole.ids[0, :4].tolist() == part.ids[0].tolist()
    assert part.ids.data_ptr() == whole.ids.data_ptr() and part.ids.shape == (1, 4)


def test_a_request_without_the_state_of_its_context_is_no_step() -> None:
    """A recurrent kernel would read in front of all slots."""
    rows = scheduled()
    of_a_hybrid = Cache(states=(torch.zeros(4, 2),))
    with pytest.raises(AssertionError, match="2 requests go on without the state of their contexts"):
        StepInputs.unpadded(rows, [0, 3], of_a_hybrid, max_blocks=16)
    for slot, part in enumerate(rows):
        part.request.state_slot = slot
    inputs = StepInputs.unpadded(rows, [0, 3], of_a_hybrid, max_blocks=16)
    assert inputs.context.state_rows is not None and inputs.context.state_rows.read.tolist() == [0, 1]
