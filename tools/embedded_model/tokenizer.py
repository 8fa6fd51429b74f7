"""The tokenizer: byte-level BPE learned from our own text, every digit a token, ChatML around turns."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
MAX_LENGTH = 4096

# `developer` is OpenAI's newer word for `system`: one marker for both, since the model learned only one.
# Content may be null or a list of parts; an unknown role is the caller's error and is named.
CHAT_TEMPLATE = """\
{%- macro text(content) -%}
{%- if content is string -%}{{ content }}
{%- elif content -%}
{%- for part in content -%}{{ part.text if part.text is string else '' }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{%- if message.role not in ['system', 'developer', 'user', 'assistant', 'tool'] -%}
{{ raise_exception('unknown role: ' ~ message.role) }}
{%- endif -%}
{{ '<|im_start|>' ~ ('system' if message.role == 'developer' else message.role) ~ '\\n' }}
{{- text(message.content) ~ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""


def train_tokenizer(corpus: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Learn merges from `corpus`; at most `vocab_size` tokens, special tokens and the 256 bytes included.

    >>> tokenizer = train_tokenizer(["one two", "one three"], 280)
    >>> tokenizer.decode(tokenizer("one 🦄 27").input_ids), tokenizer.tokenize("27")
    ('one 🦄 27', ['2', '7'])
    """
    bpe = Tokenizer(models.BPE())
    # Digits stand alone so that a column of a sum is a token; no token is ever glued to a digit.
    digits = pre_tokenizers.Split(Regex(r"\d"), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=[END_OF_TEXT, IM_START, IM_END],
        # All 256 bytes, seen or not: any text has ids and comes back unchanged.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        tokenizer_object=bpe,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
