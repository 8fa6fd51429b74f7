"""The echo backend has no model: its answer is the prompt. It serves only where the operator asks for it."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

from myserve.core.params import SamplingParams
from myserve.engine.meters import EngineLoad, EngineMeters
from myserve.engine.outputs import Delta, RequestMetrics, TokenOutput
from myserve.engine.requests.options import SubmitOptions
from myserve.engine.token_bytes import Utf8Reader
from myserve.errors import ContextLengthError, RequestError
from myserve.server.errors import EchoHasNoModelError

__all__ = ["EchoEngine", "EchoStream"]

# These need a distribution. The other parameters shape a draw, and an echo draws nothing.
_NEEDS_A_MODEL = (
    *("top_logprobs", "prompt_logprobs", "kept", "logprob_token_ids", "routed_experts"),
    *("ranks", "entropies", "waterfall"),
)


class CharacterTokenizer:
    """A tokenizer without files: a token is a character, its id the code point."""

    chat_template: str | None = None
    added_tokens_decoder: Mapping[int, Any] = {}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [ord(character) for character in text]

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]], **_: Any) -> str:
        return "\n".join(message["content"] for message in messages)


class CharacterBytes:
    """Stands for `TokenBytes`: every id is a code point."""

    special_ids: frozenset[int] = frozenset()
    is_bytewise = True
    longest = 4  # bytes of a token

    def __len__(self) -> int:
        return sys.maxunicode + 1

    def __getitem__(self, token_id: int) -> bytes:
        return chr(token_id).encode()

    def text(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return "".join(map(chr, token_ids))

    decode = text

    def places(
        self, token_ids: Sequence[int], shown: str, *, skip_special_tokens: bool = True
    ) -> list[tuple[int, None]]:
        """Return where each character is."""
        return [(place, None) for place in range(len(token_ids))]

    def bytes_reader(self) -> Utf8Reader:
        """Return a reader of the characters' bytes."""
        return Utf8Reader(self, frozenset(), "replace")


class EchoEngine:
    """Answers like an `Engine` whose model repeats the prompt."""

    tokenizer = CharacterTokenizer()
    token_bytes = CharacterBytes()
    max_model_len = 1 << 20
    vocab_size = 0x110000
    weight_version = 0
    eos_token_ids: tuple[int, ...] = ()
    routing_shape = None
    is_alive = True
    is_paused = False
    released: frozenset[str] = frozenset()
    # there are no numbers that could depend on anything
    exactness: ClassVar[dict[str, str | int | bool]] = {}
    adapters: ClassVar[dict[str, Any]] = {}
    quantization: ClassVar[dict[str, Any]] = {"method": "off"}

    def __init__(self) -> None:
        self.meters = EngineMeters()  # of steps, and an echo takes none

    @property
    def load(self) -> EngineLoad:
        return EngineLoad()

    def check_room(self, n: int) -> None:
        """Nothing waits for an echo."""

    async def prepare(self, params: SamplingParams) -> None:
        """Raise EchoHasNoModelError for a grammar."""
        if params.grammar is not None:
            raise EchoHasNoModelError("a grammar needs a model, and this server echoes", param="grammar")

    def submit(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        options: SubmitOptions | None = None,
    ) -> EchoStream:
        """Return the prompt's first `max_tokens` tokens, `n` times."""
        options = options or SubmitOptions()
        for name in _NEEDS_A_MODEL:
            if getattr(params, name) not in (None, 0, False, ()):
                raise EchoHasNoModelError(f"{name} needs a model, and this server echoes", param=name)
        if not all(_is_character(token_id) for token_id in prompt_token_ids):
            raise RequestError(
                "prompt: an echo's token ids are the code points of characters", param="prompt"
            )
        if len(prompt_token_ids) > self.max_model_len:
            raise ContextLengthError(f"the prompt has {len(prompt_token_ids)} tokens", param="prompt")
        request_id = options.request_id or uuid.uuid4().hex
        return EchoStream(list(prompt_token_ids), params, options.n, request_id)

    def load_adapter(self, name: str, folder: object, **_: object) -> Any:
        """Raise EchoHasNoModelError: an echo has no layers."""
        raise EchoHasNoModelError("an adapter needs a model, and this server echoes", param="lora_path")

    unload_adapter: Any = load_adapter

    def update_weights(self, source: object, **_: object) -> None:
        """Raise EchoHasNoModelError: an echo has no weights."""
        raise EchoHasNoModelError("new weights need a model, and this server echoes", param="path")

    async def pause(self, mode: str = "keep") -> None:
        """Raise EchoHasNoModelError: an echo takes no time."""
        raise EchoHasNoModelError("a pause needs a model, and this server echoes")

    async def resume(self) -> None:
        """Raise EchoHasNoModelError."""
        raise EchoHasNoModelError("a pause needs a model, and this server echoes")

    async def forget_prefixes(self) -> None:
        """Do nothing: an echo caches nothing."""

    async def weight_checksums(self) -> dict[str, str]:
        """Return nothing: an echo has no weights."""
        return {}

    def reset_weights(self) -> None:
        """Raise EchoHasNoModelError."""
        self.update_weights(None)

    async def release_memory(self, tags: Collection[str]) -> None:
        """Raise EchoHasNoModelError."""
        self.update_weights(None)

    async def restore_memory(self, tags: Collection[str]) -> None:
        """Raise EchoHasNoModelError."""
        self.update_weights(None)

    def shutdown(self) -> None:
        """Do nothing: no thread runs."""


class EchoStream:
    """A `RequestStream` of one token a delta, choice after choice."""

    def __init__(self, prompt: list[int], params: SamplingParams, n: int, request_id: str) -> None:
        self.request_id = request_id
        self.seed = params.seed or 0
        self._prompt_tokens = len(prompt)
        self._open = set(range(n))
        self._deltas = [delta for index in range(n) for delta in _echo(index, prompt, params.max_tokens)]

    async def next_deltas(self) -> Sequence[Delta]:
        """Return all that is left."""
        deltas, self._deltas = self._deltas, []
        self._open -= {delta.index for delta in deltas if delta.finish_reason is not None}
        return deltas

    def metrics(self, index: int) -> RequestMetrics:
        """Return the prompt's length; an echo takes no time."""
        return RequestMetrics(prompt_tokens=self._prompt_tokens)

    def abort(self) -> None:
        """End what is still open, with finish_reason "abort"."""
        self._deltas = [
            Delta(index, finish_reason="abort", metrics=self.metrics(index)) for index in sorted(self._open)
        ]


def _is_character(code_point: int) -> bool:
    # halves of a UTF-16 pair are no characters
    return 0 <= code_point < 0xD800 or 0xE000 <= code_point < 0x110000


def _echo(index: int, prompt: list[int], max_tokens: int | None) -> list[Delta]:
    said = prompt[:max_tokens]
    deltas = [
        Delta(index, chr(i), tokens=(TokenOutput(token_id=i, logprob=0.0, sampling_logprob=0.0),))
        for i in said
    ]
    end = Delta(
        index,
        finish_reason="stop" if len(said) == len(prompt) else "length",
        metrics=RequestMetrics(prompt_tokens=len(prompt)),
    )
    return [*deltas, end]
