"""Tries a tiny random model of every causal kind that transformers knows: `python -m tools.model_sweep` (half an hour).

    python -m tools.model_sweep                      # all kinds and variants; rewrites the table of docs/models.md
    python -m tools.model_sweep doge llama-yarn      # some, printed

Each kind is made, computed by transformers alone, served, and computed by a trainer's `exact_forward`, in a process
of its own. It must be served with transformers' logprobs, of prompts beyond its window and of greedy tokens, or be
refused in one sentence; whether rows are batch-invariant and whether the trainer has the server's bits is told. Ends
with status 1 where a kind is served wrong, ends the process, or fails in another way.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.combine.tiny import VOCAB_SIZE, byte_level_tokenizer
from myserve.core.params import SamplingParams
from myserve.engine.config import EngineConfig
from myserve.engine.engine import Engine
from myserve.errors import BadCheckpointError, UnsupportedModelError
from myserve.trainer.exact_forward import exact_forward
from myserve.trainer.exact_logprobs import exact_logprobs

__all__ = ["KINDS", "Verdict", "main", "table", "try_kind"]

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- model-sweep: begin", "<!-- model-sweep: end -->"
PROMPTS = tuple(
    [(start + 31 * i) % (VOCAB_SIZE - 8) + 4 for i in range(n)] for start, n in ((17, 120), (5, 37))
)
GREEDY = 6  # tokens drawn behind each
CLOSE = 2e-3  # nats: float32 sums in another order, through a few layers; or so many times what they cost transformers
TIMES_OWN = 4
LARGEST = 40_000_000  # weights of a model that is still tiny
SECONDS = 300.0
LONGEST_REFUSAL = 420  # characters of a sentence

# What configs call their sizes, and how large they are here.
_SIZES: Mapping[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner", "d_ff"), 96),
    **dict.fromkeys(("dense_intermediate_size", "intermediate_size_mlp", "encoder_ffn_dim", "decoder_ffn_dim"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads",), 4),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "moe_k", "experts_per_token", "moe_topk"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "global_head_dim"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 512),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "n_group", "topk_group"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "decoder_sparse_step"), 1),
    **dict.fromkeys(("initializer_range", "init_std"), 0.2),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCAB_SIZE),
    "sliding_window": 40,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "swa_v_head_dim": 12,
    "index_head_dim": 16,
    "index_n_heads": 4,
    "word_embed_proj_dim": 64,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 8,
    "image_size": 28,
    "patch_size": 14,
    "mm_tokens_per_image": 4,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
_MLA = {"num_key_value_heads": 4, "head_dim": None}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
_MSCALE = {"mscale": 0.7, "mscale_all_dim": 0.3, "truncate": False}
_WINDOW = {"use_sliding_window": True, "max_window_layers": 2}


def _heads(count: int, dim: int) -> dict[str, Any]:
    """Many query heads on one of keys and values."""
    return {
        "num_attention_heads": count,
        "num_key_value_heads": 1,
        "hidden_size": count * dim,
        "head_dim": dim,
    }


_MIXED = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
# What kinds need beside their sizes: by type. None: leave it to the type's own default.
_CHANGES: Mapping[str, Mapping[str, Any]] = {
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "minicpm3", "glm4_moe_lite", "youtu"), _MLA),
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa", "axk1", "axk2"), _MLA | {"qk_head_dim": None}),
    "longcat_flash": {"head_dim": 8, "num_key_value_heads": 4, "ffn_hidden_size": 96, "zero_expert_num": 2},
    "bert": {"is_decoder": True},
    "roberta": {"is_decoder": True},
    "roformer": {"is_decoder": True},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 40},
    "gemma4_text": {"layer_types": _MIXED, "num_kv_shared_layers": 0, "global_head_dim": 32},
    "gemma3n_text": {"layer_types": _MIXED, "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0] * 4},
    "granitemoehybrid": {"layer_types": ["attention"] * 4},
    "zaya": {"num_experts_per_tok": 1},
    **{key: {"num_key_value_heads": 4} for key in ("dots3_note", "dots3_note_text")},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "lfm2_moe": {"layer_types": ["full_attention", "conv", "full_attention", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "moshi": {"audio_vocab_size": 32},
    "gemma3": {
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14,
        }
    },
}  # fmt: skip
# A type as it may also be configured.
_VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "cohere-norms": ("cohere", {"use_qk_norm": True}),
    "deepseek_v2-plain-queries": ("deepseek_v2", {"q_lora_rank": None}),
    "deepseek_v3-wide-values": ("deepseek_v3", {"v_head_dim": 24}),
    "falcon-grouped": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-alibi": ("falcon", {"alibi": True}),
    "gemma4_text-one-width": ("gemma4_text", {"global_head_dim": 16}),
    "gemma4_text-shared": ("gemma4_text", {"layer_types": _MIXED[2:] * 2, "num_kv_shared_layers": 2}),
    "gpt_bigcode-many-heads": ("gpt_bigcode", {"multi_query": False}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "granite-factors": (
        "granite",
        {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22}
        | {"attention_multiplier": 0.0156},
    ),
    "llama-7-heads": ("llama", _heads(7, 8)),
    "llama-32-to-1": ("llama", _heads(32, 4)),
    **{f"llama-head-{n}": ("llama", {"head_dim": n}) for n in (10, 80, 100, 256)},
    "llama-odd-sizes": ("llama", _heads(10, 6) | {"intermediate_size": 91, "num_key_value_heads": 2}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-gelu": ("llama", {"hidden_act": "gelu"}),
    "llama-yarn": ("llama", {"rope_parameters": _YARN | {"attention_factor": 1.0}}),
    "llama-yarn-mscale": ("llama", {"rope_parameters": _YARN | _MSCALE}),
    "llama-llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
            }
        },
    ),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "llama-partial": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
    "ministral3-scaled-queries": (
        "ministral3",
        {
            "rope_parameters": _YARN
            | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
            | {"beta_fast": 32.0, "beta_slow": 1.0}
        },
    ),
    "olmo-clipped": ("olmo", {"clip_qkv": 0.5}),
    "opt-projected": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "phimoe-no-window": ("phimoe", {"sliding_window": None}),
    "qwen2-window": ("qwen2", _WINDOW),
    "qwen2_moe-window": ("qwen2_moe", _WINDOW | {"max_window_layers": 4}),
    "qwen3-window": ("qwen3", _WINDOW),
    "qwen3_moe-window": ("qwen3_moe", _WINDOW),
    "hunyuan_v1_moe-no-norms": ("hunyuan_v1_moe", {"use_qk_norm": False}),
    "stablelm-norms": ("stablelm", {"qk_layernorm": True, "use_parallel_residual": True}),
}  # fmt: skip
KINDS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    **{name: (name, {}) for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)},
    **_VARIANTS,
}
# The row of the table that a refusal stands in, by a word of its sentence.
_REASONS = {
    "AttentionInterface": "its attention does not go through transformers' interface",
    "layers of type": "recurrent, linear, sparse or chunked layers",
    "mask of its own": "gives its attention a mask that is no window",
    "hides other positions": "gives its attention a mask that is no window",
    "other keys": "attends over other keys than those of its own tokens",
    "of its own, so its requests": "keeps state, masks or positions of its own",
    "encoder-decoder": "an encoder and a decoder",
    "context may be": "its config has no number for how long a context may be",
}
OTHERWISE = "its code does not run with the engine's attention and products"


@dataclass
class Verdict:
    """What came of one kind: `result` is "runs", "refused", "not made", "WRONG" or "BROKEN"."""

    kind: str
    result: str
    words: str = ""
    rows_are_independent: bool = True
    trainer_has_the_bits: bool = True

    @property
    def is_bad(self) -> bool:
        """Whether this may not be."""
        return self.result in ("WRONG", "BROKEN")

    def line(self) -> str:
        """Say it in a line."""
        marks = "" if self.rows_are_independent else "; rows depend on their batch"
        marks += "" if self.trainer_has_the_bits else "; a trainer has other bits"
        return f"{self.kind}: {self.result}: {self.words}{marks}"


def sizes(base: PreTrainedConfig, change: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a tiny config of a type, those inside it included; `change` counts before."""
    known = set(base.to_dict()) | {name for name in _SIZES if _has(base, name)}
    writable = [name for name in known if not isinstance(getattr(type(base), name, None), property)]
    found = {name: _SIZES[name] for name in writable if name in _SIZES}
    for name, inner in type(base).sub_configs.items():
        if isinstance(inner, type) and issubclass(inner, PreTrainedConfig) and inner is not PreTrainedConfig:
            found[name] = sizes(inner(), _CHANGES.get(inner.model_type, {}))
    found |= change
    return {
        name: value
        for name, value in found.items()
        if value is not None or name in ("sliding_window", "q_lora_rank")
    }


def _has(config: PreTrainedConfig, name: str) -> bool:
    try:
        return hasattr(config, name)
    except Exception:  # some attributes of a config are ambiguous, and say so by an error of their own
        return True


def make(kind: str, folder: Path) -> None:
    """Write a tiny model of a kind. Whatever its class raises is passed on."""
    arch, change = KINDS[kind]
    change = {**_CHANGES.get(arch, {}), **change}
    config = AutoConfig.for_model(arch, **sizes(AutoConfig.for_model(arch), change))
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if count > LARGEST:
        raise ValueError(f"{count} weights: its config names sizes that are not known here")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # norms of 1 and biases of 0 would hide mistakes
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)


@torch.inference_mode()
def _own(folder: Path) -> tuple[list[tuple[list[int], list[float]]], float]:
    """transformers' greedy tokens behind each prompt, and the logprobs of all tokens but the first; and their rounding.

    It is the largest difference from the same in float64.
    """
    load = AutoModelForCausalLM.from_pretrained
    try:
        model = load(folder, attn_implementation="eager").eval()
    except ValueError:  # it has no such attention
        model = load(folder).eval()
    found = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(GREEDY):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        found.append((ids, _logprobs(model, ids)))
    try:
        precise = [_logprobs(model.double(), ids) for ids, _ in found]
    except RuntimeError:  # it names float32 somewhere
        return found, 0.0
    gaps = [
        abs(a - b)
        for (_, own), right in zip(found, precise, strict=True)
        for a, b in zip(own, right, strict=True)
    ]
    return found, max(gaps)


def _logprobs(model: Any, ids: list[int]) -> list[float]:
    rows = model(torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)
    return [float(rows[i, token]) for i, token in enumerate(ids[1:])]


def _served(folder: Path) -> tuple[list[tuple[list[int], list[float]]], bool]:
    """The engine's greedy tokens and logprobs, both prompts at once; and whether its rows are independent."""
    import asyncio

    params = SamplingParams(max_tokens=GREEDY, temperature=0, ignore_eos=True, prompt_logprobs=0)
    engine = Engine.from_pretrained(
        str(folder), EngineConfig(num_blocks=64, max_num_seqs=8, self_test="always")
    )

    async def one(prompt: list[int]) -> tuple[list[int], list[float]]:
        ids, logprobs = list(prompt), list[float]()
        async for delta in engine.submit(prompt, params):
            if delta.error is not None:
                raise delta.error
            logprobs += [
                entry.logprob for entry in (delta.prompt_logprobs or ())[1:] if entry.logprob is not None
            ]
            ids += [token.token_id for token in delta.tokens]
            logprobs += [token.logprob for token in delta.tokens]
        return ids, logprobs

    async def both() -> list[tuple[list[int], list[float]]]:
        return list(await asyncio.gather(*(one(prompt) for prompt in PROMPTS)))

    return asyncio.run(both()), bool(engine.exactness["rows_are_independent"])


def judge(kind: str, folder: Path) -> Verdict:
    """Make, compute, serve and train one kind, in this process."""
    try:
        make(kind, folder)
        own, rounding = _own(folder)
    except Exception as error:
        return Verdict(kind, "not made", f"{type(error).__name__}: {_one_line(error)}")
    try:
        served, independent = _served(folder)
    except (UnsupportedModelError, BadCheckpointError) as error:
        clear = "\n" not in str(error) and len(str(error)) <= LONGEST_REFUSAL
        return Verdict(kind, "refused" if clear else "BROKEN", str(error).replace(str(folder), "it"))
    except Exception as error:
        return Verdict(kind, "BROKEN", f"{type(error).__name__}: {_one_line(error)}")
    pairs = [zip(ours, theirs, strict=True) for (_, ours), (_, theirs) in zip(served, own, strict=True)]
    gap = max(abs(a - b) for pair in pairs for a, b in pair)
    same = [ids for ids, _ in served] == [ids for ids, _ in own]
    verdict = Verdict(
        kind,
        "runs" if same and gap < max(CLOSE, TIMES_OWN * rounding) else "WRONG",
        f"logprobs differ by {gap:.2g}",
        independent,
    )
    if not same:
        verdict.words += ", greedy tokens too"
    verdict.trainer_has_the_bits, why = _trainer_has_the_bits(folder, served)
    verdict.words += why
    return verdict


def _trainer_has_the_bits(folder: Path, served: Sequence[tuple[list[int], list[float]]]) -> tuple[bool, str]:
    try:
        model = exact_forward(AutoModelForCausalLM.from_pretrained(folder).eval())
        with torch.no_grad():
            gaps = [
                max(abs(a - b) for a, b in zip(_trained(model, ids), logprobs, strict=True))
                for ids, logprobs in served
            ]
    except Exception as error:
        return False, f"; exact_forward raises {type(error).__name__}: {_one_line(error)}"
    return max(gaps) == 0.0, "" if max(gaps) == 0.0 else f"; of a trainer by {max(gaps):.2g}"


def _trained(model: Any, ids: list[int]) -> list[float]:
    logits = model(torch.tensor([ids]), use_cache=False).logits[0, :-1]
    logprobs: list[float] = exact_logprobs(logits, torch.tensor(ids[1:])).tolist()
    return logprobs


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def try_kind(kind: str, seconds: float = SECONDS) -> Verdict:
    """Judge one kind in a process of its own, which may die or hang. (Forked: it has all that is imported here.)"""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)

    def child() -> None:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        with tempfile.TemporaryDirectory() as folder:
            verdict = judge(kind, Path(folder))
        sending.send(asdict(verdict))
        os._exit(0)  # the engine's thread and its helpers end with the process

    process = context.Process(target=child)
    process.start()
    sending.close()
    try:
        if receiving.poll(seconds):
            return Verdict(**receiving.recv())
        process.kill()
        return Verdict(kind, "BROKEN", f"no verdict within {seconds:.0f} s")
    except EOFError:
        process.join()
        return Verdict(kind, "BROKEN", f"its process ended with {process.exitcode}")
    finally:
        process.join()
        receiving.close()


def table(verdicts: Sequence[Verdict]) -> Iterator[str]:
    """Yield the lines of the page's table."""
    rows: dict[str, list[str]] = defaultdict(list)
    for verdict in verdicts:
        variant = verdict.kind in _VARIANTS
        if verdict.result == "runs":
            rows["runs, as variants" if variant else "runs"].append(verdict.kind)
        elif verdict.result == "refused":
            rows[f"refused: {_reason(verdict.words)}"].append(verdict.kind)
        elif verdict.result == "not made":
            rows["not tried: no tiny one could be made of its config"].append(verdict.kind)
    yield "| result | kinds |"
    yield "|---|---|"
    first = ["runs", "runs, as variants"]
    last = sorted(row for row in rows if row.startswith("not tried"))
    for row in [*first, *sorted(rows.keys() - {*first, *last}), *last]:
        if rows[row]:
            yield f"| {row} | {_listed(rows[row])} |"
    yield ""
    running = [verdict for verdict in verdicts if verdict.result == "runs"]
    dependent = [verdict.kind for verdict in running if not verdict.rows_are_independent]
    yield f"Of those that run, rows depend on their batch in: {_listed(dependent) or 'none'}."
    yield ""
    off_policy = [verdict.kind for verdict in running if not verdict.trainer_has_the_bits]
    yield f"Of those that run, `exact_forward` has other bits than the server in: {_listed(off_policy) or 'none'}."


def _listed(kinds: Sequence[str]) -> str:
    return " ".join(f"`{kind}`" for kind in sorted(kinds))


def _reason(words: str) -> str:
    return next((row for word, row in _REASONS.items() if word in words), OTHERWISE)


def write_page(verdicts: Sequence[Verdict], page: Path = PAGE) -> None:
    """Put the table in place of the page's."""
    commit = subprocess.run(
        ["git", "describe", "--always"], cwd=PAGE.parent, capture_output=True, text=True, check=True
    ).stdout.strip()
    when = f"{time.strftime('%Y-%m-%d')}, commit {commit}, transformers {transformers.__version__}"
    text = page.read_text()
    lines = [f"{BEGIN} (written by `python -m tools.model_sweep`: {when}) -->", *table(verdicts), END]
    pattern = re.escape(BEGIN) + r".*?" + re.escape(END)
    page.write_text(re.sub(pattern, lambda _: "\n".join(lines), text, flags=re.DOTALL))


def main(arguments: list[str] | None = None) -> int:
    """Try kinds; return 1 where one is bad."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="*", help="all, where none is named; then the page is rewritten")
    parser.add_argument("--results", type=Path, help="a file of verdicts: kinds in it are not tried again")
    parser.add_argument(
        "--seconds", type=float, help="stop after so long, with status 3; --results goes on later"
    )
    options = parser.parse_args(arguments)
    known = {verdict.kind: verdict for verdict in _read(options.results)}
    end = time.monotonic() + (options.seconds or float("inf"))
    wanted = options.kinds or list(KINDS)
    for kind in wanted:
        if kind in known and not options.kinds:
            continue
        if time.monotonic() > end:
            return 3
        known[kind] = try_kind(kind)
        print(known[kind].line(), flush=True)
        if options.results is not None:
            options.results.write_text("\n".join(json.dumps(asdict(v)) for v in known.values()) + "\n")
    verdicts = [known[kind] for kind in wanted]
    if not options.kinds:
        write_page(verdicts)
    bad = [verdict for verdict in verdicts if verdict.is_bad]
    print(f"{len(verdicts)} kinds, {len(bad)} of them bad")
    return 1 if bad else 0


def _read(file: Path | None) -> list[Verdict]:
    if file is None or not file.exists():
        return []
    return [Verdict(**json.loads(line)) for line in file.read_text().splitlines()]


if __name__ == "__main__":
    sys.exit(main())
