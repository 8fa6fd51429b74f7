"""From a `Grammar` to a matcher of llguidance, within bounds that are counted in work and never in time.

A mask is a function of the grammar and of the tokens so far. So must be its failure: a bound on seconds would let a
busy machine decide which requests succeed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, grammar_from

from myserve.core.grammar import Grammar
from myserve.errors import RequestError
from myserve.grammar.schemas import shared_schema

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

__all__ = ["Compiler", "Vocabulary", "in_one_line", "limits", "refusal"]

# Between the marks of a JSON text a model may write one space, or a line break and an indentation. Without a bound, a
# model that has nothing to say goes on with white space for ever. A schema's own `x-guidance` has precedence.
JSON_OPTIONS: JsonCompileOptions = {"whitespace_pattern": r" |\r?\n[ \t]{0,40}"}

# What is forced by the grammar is tokenized as the model's own tokenizer would, to keep to the tokens that it knows;
# no further than this, for a grammar may force a million characters.
FORCED_CHARACTERS = 512

LONGEST_REASON = 300  # characters of a message that go back to the caller


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A model's vocabulary as grammars need it: each id's bytes, and the ids that are no text."""

    tokens: Sequence[bytes]
    special_ids: frozenset[int]
    eos_ids: tuple[int, ...]


def limits() -> LLParserLimits:
    """Some 50 ms for the costliest step, some 40 MB for the largest lexer; ordinary schemas need a hundredth.

    A JSON object may have some 200 optional properties under these, and any number that are required.
    """
    return LLParserLimits(
        max_lexer_states=20_000,
        max_grammar_size=200_000,
        max_items_in_row=1_000,
        step_max_items=3_000,
        step_lexer_fuel=100_000,
        verbose_errors=False,
    )


class _Wrapped:
    """A vocabulary as llguidance's `TokenizerWrapper` wants it."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary, encode: Callable[[str], list[int]]) -> None:
        self.eos_token_id = vocabulary.eos_ids[0]
        self.tokens = vocabulary.tokens
        self.special_token_ids = sorted(vocabulary.special_ids)
        self._encode = encode

    def __call__(self, text: bytes) -> list[int]:
        return self._encode(text.decode("utf-8", "ignore")[:FORCED_CHARACTERS])


class Compiler:
    """Compiles for one vocabulary. `encode` is the tokenizer's, without special tokens. Any thread may call it."""

    def __init__(self, vocabulary: Vocabulary, encode: Callable[[str], list[int]]) -> None:
        if not vocabulary.eos_ids:
            raise RequestError(
                "this model has no EOS token, so that no grammar could ever end", param="grammar"
            )
        wrapper = TokenizerWrapper(_Wrapped(vocabulary, encode))
        eos: list[int] = list(vocabulary.eos_ids)
        self._tokenizer = LLTokenizer(wrapper, n_vocab=len(vocabulary.tokens), eos_token=eos)

    def compile(self, grammar: Grammar) -> LLMatcher:
        """A matcher at the first token. Raises RequestError with the reason for what cannot be compiled."""
        try:
            matcher = LLMatcher(self._tokenizer, _definition(grammar), log_level=0, limits=limits())
        except (ValueError, RecursionError) as error:
            raise refusal(grammar, str(error) or type(error).__name__) from error
        matcher.compute_bitmask()  # some grammars prove to be empty only now
        if matcher.is_error():
            raise refusal(grammar, matcher.get_error())
        return matcher


def refusal(grammar: Grammar, reason: str) -> RequestError:
    """Return the caller's error, with llguidance's reason in one line.

    >>> str(refusal(Grammar("regex", "("), "unclosed group\\n  (\\n  ^"))
    'this regex cannot be used: unclosed group ( ^'
    """
    kind = {"json_schema": "JSON schema", "regex": "regex", "lark": "grammar"}[grammar.kind]
    words = in_one_line(reason)
    return RequestError(f"this {kind} cannot be used: {words}", param="grammar", code="invalid_grammar")


def in_one_line(reason: str) -> str:
    """llguidance's words without its dumps, cut where they would fill a screen."""
    words = " ".join(reason.replace("<non-verbose/>", "").split())
    return words if len(words) <= LONGEST_REASON else words[:LONGEST_REASON] + " …"


def _definition(grammar: Grammar) -> str:
    """llguidance's own form of the source."""
    match grammar.kind:
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(shared_schema(grammar.source), defaults=JSON_OPTIONS)
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.source)
        case "lark":
            return grammar_from("grammar", grammar.source)
