"""The cache as plain pages, for devices that our kernels do not run on: PyTorch stores, and PyTorch attends.

Where it can, by the flash attention that PyTorch brings (`varlen_attn`), which reads pages where they lie. What it can
is found out by calling it: its signature, and what it does with pages, differ from one release and one GPU to the next.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from myserve.engine.mixers.attention import PagedContext, dense_attention

__all__ = [
    "FLASH_BLOCK", "PLAIN_BLOCK", "DevicePages", "Flash", "Heads", "VarlenAttention", "find_flash",
    "gathered_attention", "library_attention",
]  # fmt: skip

log = logging.getLogger(__name__)

FLASH_BLOCK = 256  # FlashAttention 2 takes pages of multiples of it, by its own message: "divisible by 256"
PLAIN_BLOCK = 32  # where requests are gathered, any size does
MOST_DIM = 256
# of attention over random numbers of size 1 in bfloat16; what is wrong differs by whole numbers
AGREEMENT = 0.05
_KEYWORDS = {"scale", "window_size", "enable_gqa", "seqused_k", "block_table", "num_splits"}

VarlenAttention = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Flash:
    """PyTorch's `varlen_attn` over pages, in one order whatever is beside a row.

    Three things make it so. `num_splits=1`: a context is never cut (otherwise the cut depends on the batch, and
    FlashAttention 2 leaves rows unwritten: pytorch issue 194167). `max_q` is never 1, for there FlashAttention 2 lays
    query heads out as rows. `max_k` is what a table has room for, not what is in it, for a window that reaches further
    than `max_k` is no window to it, and another kernel.
    """

    varlen: VarlenAttention
    key_starts: (
        bool  # whether cu_seq_k is given, which has no meaning with pages; FlashAttention 3 refuses it
    )

    def __call__(
        self, query: Tensor, key_cache: Tensor, value_cache: Tensor, context: PagedContext, *, scale: float,
        window: int,
    ) -> Tensor:  # fmt: skip
        tables = context.block_tables
        out: Tensor = self.varlen(
            query if query.stride(-1) == 1 else query.contiguous(),
            key_cache,
            value_cache,
            context.query_start,
            context.query_start if self.key_starts else None,
            max(2, query.shape[0]),
            tables.shape[1] * key_cache.shape[1],
            scale=scale,
            window_size=(window - 1 if window else -1, 0),
            enable_gqa=True,
            seqused_k=context.context_lens,
            block_table=tables,
            num_splits=1,
        )
        return out


@dataclass(frozen=True, slots=True)
class DevicePages:
    """Stores to pages and attends over them (`attention.Pages`)."""

    flash: Flash | None

    def allocate(
        self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype,
        device: torch.device,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Return K and V of one layer, [num_blocks + 1, block_size, num_kv_heads, head_dim].

        The last block is for padding rows.
        """
        shape = (num_blocks + 1, block_size, num_kv_heads, head_dim)
        return torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)

    def store(
        self, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write new keys and values [T, Hkv, D] to their slots [T]; slot -1, of padding rows, is the last block's last.

        To leave padding rows out, the host would have to wait for the device. Raises ValueError for other shapes.
        """
        for new, cache in ((key, key_cache), (value, value_cache)):
            if new.shape[1] != cache.shape[2] or new.shape[2] > cache.shape[3]:
                raise ValueError(f"{tuple(new.shape)} does not fit pages of {tuple(cache.shape)}")
            cache.flatten(0, 1)[slot_mapping] = F.pad(new, (0, cache.shape[3] - new.shape[2])).to(cache.dtype)

    def attend(
        self, query: Tensor, key_cache: Tensor, value_cache: Tensor, context: PagedContext, *, scale: float,
        window: int, chunk: int, softcap: float, sinks: Tensor | None, value_dim: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Attend as `attention.paged_attention` does; what padding rows get is not defined."""
        if self.flash is not None and not softcap and sinks is None and not chunk:
            return self.flash(query, key_cache, value_cache, context, scale=scale, window=window)
        seen = {"window": window, "chunk": chunk}
        options: dict[str, Any] = {"scale": scale, "softcap": softcap, "sinks": sinks, **seen}
        value_dim = query.shape[2] if value_dim is None else value_dim
        keys, values = key_cache[..., : query.shape[2]], value_cache[..., :value_dim]
        return gathered_attention(query, keys, values, context, options)


def gathered_attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, context: PagedContext, options: dict[str, Any]
) -> Tensor:
    """Attend request by request, never padded: for what flash attention does not do."""
    known = context.on_host or context
    starts, lens = known.query_start.tolist(), known.context_lens.tolist()
    size, out = key_cache.shape[1], query.new_zeros(*query.shape[:2], value_cache.shape[3])
    for r, length in enumerate(lens):
        rows = slice(starts[r], starts[r + 1])
        if starts[r] == starts[r + 1]:
            continue
        blocks = context.block_tables[r, : -(-length // size)].long()
        key, value = (c[blocks].flatten(0, 1)[:length].transpose(0, 1) for c in (key_cache, value_cache))
        attended = dense_attention(query[rows].transpose(0, 1), key, value, **options)
        out[rows] = attended.transpose(0, 1)
    return out


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads that attention is to be done on."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    softcap: float = 0.0
    sinks: bool = False
    uniform: bool = True  # every layer has these heads, and values are as wide as keys


def find_flash(
    heads: Heads, device: torch.device, varlen: VarlenAttention | None
) -> tuple[Flash | None, str]:
    """Return the flash attention for such heads, or None; and its name for the report, or the reason why not.

    `varlen`: what `library_attention` found.
    """
    reason = _why_not(heads, varlen)
    if reason is None and varlen is not None:
        for flash in (Flash(varlen, key_starts=False), Flash(varlen, key_starts=True)):
            reason = _tried(flash, heads, device)
            if reason is None:
                return flash, "flash"
    log.info("attention by gathering each request's keys, slowly: %s", reason)
    return None, f"gathered: {reason}"


def library_attention() -> VarlenAttention | None:
    """Return PyTorch's `varlen_attn` if it takes pages: it does from 2.12 on."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if set(inspect.signature(varlen_attn).parameters) >= _KEYWORDS else None


def _why_not(heads: Heads, varlen: VarlenAttention | None) -> str | None:
    if varlen is None:
        return f"varlen_attn of PyTorch {torch.__version__} takes no pages"
    if heads.dtype not in (torch.bfloat16, torch.float16):
        return f"flash attention does not compute in {str(heads.dtype).removeprefix('torch.')}"
    if heads.head_dim > MOST_DIM or heads.head_dim % 8:
        return f"flash attention has no heads of {heads.head_dim}"
    if not heads.uniform:
        return "flash attention is tried for one width of heads alone"
    if heads.softcap:
        return "varlen_attn caps no scores"
    return "varlen_attn has no sinks" if heads.sinks else None


@torch.inference_mode()
def _tried(flash: Flash, heads: Heads, device: torch.device) -> str | None:
    """Two requests on scattered pages, with and without a window: None if it is attention, else what is wrong."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(heads.dtype).to(device)

    def ints(*values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    keys, values = (random(5, FLASH_BLOCK, heads.kv_heads, heads.head_dim) for _ in range(2))
    context = PagedContext(
        layers=(),
        slot_mapping=torch.empty(0, dtype=torch.int64, device=device),
        block_tables=ints([3, 1], [2, 0]),
        query_start=ints(0, 40, 41),
        context_lens=ints(FLASH_BLOCK + 9, 5),
    )
    query = random(41, heads.heads, heads.head_dim)
    for window in (0, 17):
        options: dict[str, Any] = {"scale": heads.head_dim**-0.5, "window": window}
        try:
            got = flash(query, keys, values, context, **options)
            wide = query.float(), keys.float(), values.float()
            wanted = gathered_attention(*wide, context, options)
            difference = float((got - wanted).abs().max())
        except (RuntimeError, TypeError, ValueError) as error:
            return str(error).splitlines()[0]
        if not difference < AGREEMENT:
            return f"varlen_attn differs from attention by {difference:.2g}"
    return None
