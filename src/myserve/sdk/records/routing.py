"""Routing matrices as arrays: from base64 to the rows that `myserve.replay_routing` takes. Needs numpy."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

from myserve.sdk.types import SampledCompletion

if TYPE_CHECKING:
    import numpy as np

__all__ = ["NOT_KNOWN", "aligned_routing", "routing_array"]

NOT_KNOWN = -1  # in place of an expert's id: replay leaves the choice to the model


def routing_array(completion: SampledCompletion, num_moe_layers: int | None = None) -> np.ndarray[Any, Any]:
    """Return a completion's routing as a read-only array [rows, layers with experts, experts per token], best first.

    The rows are as many as `routing_matrices` has; uint8, or uint16 for a model of more than 256 experts. A server
    of ours reports how many layers there are; for another one, pass `num_moe_layers`.
    Raises ValueError for a completion without routing, and for rows that do not fit.

    >>> sample = SampledCompletion(text="a", full_tokens=[1, 5], prompt_len=1, finish_reason="stop", completion_len=1,
    ...     routing_matrices=["AwEABw=="], routing_shape=[2, 2])
    >>> routing_array(sample).tolist()
    [[[3, 1], [0, 7]]]
    """
    import numpy as np

    if completion.routing_matrices is None:
        raise ValueError("this completion has no routing: sample with include_routing_matrix=True")
    layers = completion.routing_shape[0] if completion.routing_shape else num_moe_layers
    if layers is None:
        raise ValueError("the server did not say how many layers have experts: pass num_moe_layers")
    rows = [base64.b64decode(row, validate=True) for row in completion.routing_matrices]
    if layers < 1 or completion.routing_dtype not in ("uint8", "uint16"):
        raise ValueError(f"no routing has {layers} layers of {completion.routing_dtype!r} ids")
    dtype = np.dtype(completion.routing_dtype).newbyteorder("<")
    size = len(rows[0]) if rows else layers * dtype.itemsize
    if size % (layers * dtype.itemsize) or any(len(row) != size for row in rows):
        sizes = sorted({len(row) for row in rows})
        raise ValueError(f"rows of {sizes} bytes are no {layers} layers of equally many {dtype.name} ids")
    return np.frombuffer(b"".join(rows), dtype).reshape(len(rows), layers, -1)


def aligned_routing(completion: SampledCompletion, num_moe_layers: int | None = None) -> np.ndarray[Any, Any]:
    """Return the routing of every token of `full_tokens` when a model reads it: int32 [P+C, layers, experts per token].

    It is -1 where it is not known: for the last token, which was not read yet, and for the prompt's but its last,
    unless the prompt was echoed. This is what `myserve.replay_routing` takes for `full_tokens`; pad with -1.

    >>> sample = SampledCompletion(text="a", full_tokens=[1, 2, 5], prompt_len=2, finish_reason="stop",
    ...     completion_len=1, routing_matrices=["AwE="], routing_shape=[1, 2])
    >>> aligned_routing(sample).tolist()
    [[[-1, -1]], [[3, 1]], [[-1, -1]]]
    """
    import numpy as np

    rows = routing_array(completion, num_moe_layers)
    length = len(completion.full_tokens)
    aligned = np.full((length, *rows.shape[1:]), NOT_KNOWN, np.int32)
    # A row belongs to the token that was drawn from it, and was computed when the one before was read.
    aligned[length - 1 - len(rows) : length - 1] = rows
    return aligned
