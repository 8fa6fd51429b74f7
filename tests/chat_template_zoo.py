"""Chat templates of the big families, by their structure and in our own words, each with its control tokens."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from tokenizer_zoo import KINDS

CALL = (
    '{% for call in m.tool_calls %}<tool_call>{"name": "{{ call.function.name }}", "arguments": '
    "{{ call.function.arguments | tojson }}}</tool_call>{% endfor %}"
)


@dataclass(frozen=True, slots=True)
class Family:
    """`template`: one text, or several by name. `words` are added tokens that are not special."""

    template: str | dict[str, str]
    special: tuple[str, ...]
    words: tuple[str, ...] = ()
    has_system: bool = True
    has_tools: bool = True
    bos: str | None = None


FAMILIES = {
    # Qwen: a system turn that is always there and lists the tools, calls in marks, thoughts cut off
    "chatml": Family(
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
        "{% else %}{% set system = 'You are helpful.' %}{% set rest = messages %}{% endif %}"
        "<|im_start|>system\n{{ system }}"
        "{% if tools %}\n# Tools{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}"
        "\nAnswer in <tool_call></tool_call>"
        "{% endif %}<|im_end|>\n"
        "{% for m in rest %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' %}{{ m.content.split('</think>')[-1].lstrip('\\n') }}"
        "{% if m.tool_calls %}" + CALL + "{% endif %}"
        "{% elif m.role == 'tool' %}<tool_response>\n{{ m.content }}\n</tool_response>"
        "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
        special=("<|im_start|>", "<|im_end|>"),
        words=("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    ),
    # Llama 3: headers, tools in the first user turn, results as ipython
    "headers": Family(
        "{{ bos_token }}{% for m in messages %}"
        "<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>\n\n"
        "{% if loop.first and tools %}Functions: "
        "{% for tool in tools %}{{ tool | tojson(indent=4) }}\n{% endfor %}{% endif %}"
        '{% if m.tool_calls %}{% for call in m.tool_calls %}{"name": "{{ call.function.name }}", '
        '"parameters": {{ call.function.arguments | tojson }}}{% endfor %}'
        "{% else %}{{ m.content | trim }}{% endif %}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        special=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        bos="<|begin_of_text|>",
    ),
    # Llama 2 and Mistral: instructions in brackets, the system prompt inside the first, turns must alternate
    "instructions": Family(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
        "{% set rest = messages[1:] %}{% else %}{% set system = none %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if m.role == 'user' %}[INST] "
        "{% if loop.first and system is not none %}<<SYS>>\n{{ system }}\n<</SYS>>\n\n"
        "{% endif %}{{ m.content.strip() }} [/INST]"
        "{% else %} {{ m.content.strip() }} {{ eos_token }}{% endif %}{% endfor %}",
        special=("<s>", "[INST]", "[/INST]"),
        has_tools=False,
        bos="<s>",
    ),
    # Gemma: the model's own role name, no system turn
    "turns": Family(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        special=("<bos>", "<start_of_turn>", "<end_of_turn>"),
        has_system=False,
        has_tools=False,
        bos="<bos>",
    ),
    # Phi 3: roles are tokens
    "roles": Family(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        special=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        has_tools=False,
    ),
    # DeepSeek: letters outside ASCII, calls between tokens of their own, null content told apart
    "bars": Family(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
        "{% elif m.role == 'user' %}<｜User｜>{{ m.content }}"
        "{% elif m.role == 'tool' %}<｜tool▁outputs▁begin｜>{{ m.content }}<｜tool▁outputs▁end｜>"
        "{% else %}<｜Assistant｜>{% if m.content is not none %}{{ m.content }}{% endif %}"
        "{% if m.tool_calls %}<｜tool▁calls▁begin｜>{% for call in m.tool_calls %}{{ call.function.name }}\n"
        "{{ call.function.arguments | tojson }}{% endfor %}<｜tool▁calls▁end｜>{% endif %}"
        "<｜end▁of▁sentence｜>{% endif %}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>{% endif %}",
        special=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
        words=(
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁calls▁end｜>",
            "<｜tool▁outputs▁begin｜>",
            "<｜tool▁outputs▁end｜>",
        ),
        bos="<｜begin▁of▁sentence｜>",
    ),
    # Command R: two templates by name; with tools the second is taken, which has control words of its own
    "named": Family(
        {
            "default": "{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|>{{ m.role }}: {{ m.content }}"
            "<|END_OF_TURN_TOKEN|>{% endfor %}"
            "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|>bot: {% endif %}",
            "tool_use": "{{ bos_token }}<|TOOLS|>{% for tool in tools %}{{ tool.function.name }}{% endfor %}"
            "<|END_TOOLS|>"
            "{% for m in messages %}<|START_OF_TURN_TOKEN|>{{ m.role }}: {{ m.content }}<|END_OF_TURN_TOKEN|>"
            "{% endfor %}{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|>bot: {% endif %}",
        },
        special=("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
        words=("<|TOOLS|>", "<|END_TOOLS|>"),
        bos="<BOS_TOKEN>",
    ),
    # Gemma 3 and Llama 4: content is a string or parts
    "string or parts": Family(
        "{% for m in messages %}<start>{{ m.role }}\n{% if m.content is string %}{{ m.content }}"
        "{% else %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}<stop>{% endfor %}"
        "{% if add_generation_prompt %}<start>assistant\n{% endif %}",
        special=("<start>", "<stop>"),
        has_tools=False,
    ),
    # models of images: content is parts, and a string would be left out
    "parts alone": Family(
        "{% for m in messages %}<start>{{ m.role }}\n"
        "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}"
        "{% endfor %}<stop>{% endfor %}"
        "{% if add_generation_prompt %}<start>assistant\n{% endif %}",
        special=("<start>", "<stop>"),
        has_tools=False,
    ),
    # gpt-oss: channels, and a system turn of its own before the developer's
    "channels": Family(
        "<|start|>system<|message|>Effort: {{ reasoning_effort or 'medium' }}<|end|>"
        "{% for m in messages %}<|start|>{{ 'developer' if m.role == 'system' else m.role }}"
        "{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        special=("<|start|>", "<|message|>", "<|channel|>", "<|end|>"),
        has_tools=False,
    ),
}


def family_tokenizer(name: str, base: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of a kind with a family's control tokens and template."""
    structure = FAMILIES[name]
    fast: PreTrainedTokenizerFast = KINDS[base]()
    fast.add_tokens([AddedToken(word, normalized=False) for word in structure.words])
    special = [AddedToken(token, normalized=False, special=True) for token in structure.special]
    fast.add_tokens(special, special_tokens=True)
    if structure.bos is not None:
        fast.bos_token = structure.bos
    fast.chat_template = structure.template
    return fast
