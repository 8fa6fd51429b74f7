"""A model from a path or a hub id, ready for packed batches; one that cannot run so is refused with the reason."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from myserve.engine.batch_invariance import vml_warmup
from myserve.engine.config import EngineConfig
from myserve.engine.kernels.warm import warm
from myserve.engine.memory.prefault import Reserve
from myserve.engine.mixers.attention_pass import ATTENTION_NAME, register_attention
from myserve.engine.mixers.indexed_attention import INDEXED, index_limit
from myserve.engine.weights.empty_model import (
    BUILDING,
    checkpoint_folder,
    fill,
    has_more_than_text,
    keep_text_alone,
    model_without_values,
    names_of_towers,
)
from myserve.engine.weights.formats.decoded import DecodedSnapshot, described_quantization
from myserve.engine.weights.formats.from_gguf.config import gguf_config
from myserve.engine.weights.formats.from_gguf.file import GgufFile, is_gguf
from myserve.engine.weights.formats.from_gguf.snapshot import GgufSnapshot, scale_frequencies
from myserve.engine.weights.formats.from_gguf.tokenizer import gguf_tokenizer
from myserve.engine.weights.int8_checkpoint import MARK, int8_scheme, load_int8
from myserve.engine.weights.loading_report import judge
from myserve.engine.weights.memory_gate import refuse_what_does_not_fit, stored_tensors
from myserve.engine.weights.plan import WeightNames
from myserve.engine.weights.read_config import in_a_line, read_config
from myserve.engine.weights.snapshot import FolderSnapshot, Snapshot, TensorInfo
from myserve.errors import BadCheckpointError, BadSnapshotError, MyserveError, UnsupportedModelError

__all__ = ["LoadedModel", "load", "load_tokenizer", "resolve_device"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in eval mode on its device, with its tokenizer and the facts that generation needs."""

    model: Any  # transformers' PreTrainedModel; its own annotations do not survive strict checking
    tokenizer: Any
    eos_token_ids: tuple[int, ...]
    max_model_len: int
    vocab_size: int  # of the logits: padded vocabularies are wider than the tokenizer's
    device: torch.device
    weight_names: WeightNames
    num_weights: int  # numbers that a token is multiplied with: all but those of the embedding and the head
    casts: bool  # an explicit dtype: what has another is rounded to it, now and in every update
    limit: str = ""  # why it is served with shorter contexts than it was made for; empty where it is not
    quantize: Literal["off", "int8"] = "off"  # what its linear layers, experts and output layer become


def load(model: str | os.PathLike[str], config: EngineConfig, reserve: Reserve | None = None) -> LoadedModel:
    """Load `model`, a path or hub id, with our attention in place of its own. `reserve`: memory it has already.

    Raises UnsupportedModelError for a model that cannot be batched, BadCheckpointError for weights that are not whole,
    NotEnoughMemoryError for one that would not fit.
    """
    try:
        return _load(os.fspath(model), config, reserve)
    except (MyserveError, OSError, ImportError, MemoryError):
        raise
    except (
        Exception
    ) as error:  # what a file says is used in many places, transformers' among them, and may be absurd
        log.debug("%s was not loaded", model, exc_info=True)
        raise BadCheckpointError(
            f"{model} cannot be loaded ({type(error).__name__}: {in_a_line(error)}); if its files are whole, report "
            "this"
        ) from error


def _load(model: str, config: EngineConfig, reserve: Reserve | None) -> LoadedModel:
    vml_warmup.initialize()
    register_attention()
    device = torch.device(resolve_device(config.device))
    gguf = GgufFile(model) if is_gguf(model) else None
    hf_config = gguf_config(gguf) if gguf else read_config(model, config.trust_remote_code)
    text_config = hf_config.get_text_config(decoder=True)
    refuse_what_cannot_be_packed(hf_config)
    refuse_what_cannot_be_packed(text_config)
    longest = context_length(text_config, config.max_model_len)
    if limit := index_limit_of(text_config, longest, config.max_model_len):
        longest = index_limit(text_config) or longest
        log.warning("%s is served with a limit: %s", model, limit)
    is_int8 = int8_scheme(hf_config)
    described = None if is_int8 else described_quantization(hf_config)
    quantize = config.quantize if getattr(hf_config, MARK, None) != "int8" else "int8"
    if is_int8 or quantize == "int8":
        _refuse_where_int8_cannot_run(device, config, model if is_int8 else "quantize=int8")
    dtype = _dtype(config, hf_config, gguf, is_decoded=described is not None)
    gate = partial(
        refuse_what_does_not_fit,
        model,
        hf_config,
        config,
        device,
        dtype,
        in_hand=reserve.num_filled if reserve is not None else 0,
        is_int8=is_int8,
        is_decoded=described is not None or gguf is not None,
    )
    if gguf is not None:
        gate({name: TensorInfo(torch.float32, tensor.shape) for name, tensor in gguf.tensors.items()})
    else:
        gate(stored_tensors(model, described, text_alone=has_more_than_text(hf_config)))
    if device.type == "cpu":  # while weights are read and packed: both leave Python to others
        half = torch.bfloat16 in (dtype, hf_config.dtype)
        kernels = partial(warm, torch.bfloat16 if half else torch.float32, int8=quantize == "int8")
        threading.Thread(target=kernels).start()
    removed: tuple[str, ...] = ()
    with ThreadPoolExecutor(1) as beside:
        tokenizer_coming = beside.submit(load_tokenizer, model, trust_remote_code=config.trust_remote_code)
        if is_int8:
            loaded = load_int8(
                model,
                hf_config,
                dtype,
                attention=ATTENTION_NAME,
                trust_remote_code=config.trust_remote_code,
            )
        elif gguf is not None:
            loaded = _fill_from_gguf(gguf, hf_config, dtype)
        elif described is not None or has_more_than_text(hf_config):
            loaded, removed = _fill_from_folder(model, hf_config, described, dtype, config.trust_remote_code)
        else:
            loaded = _load_weights(model, dtype, config.trust_remote_code)
        tokenizer = tokenizer_coming.result()
    loaded = loaded.eval().requires_grad_(False).to(device)
    head = loaded.get_output_embeddings()
    if head is None:
        raise UnsupportedModelError(f"{type(loaded).__name__} has no output layer over a vocabulary")
    vocab_size = head.weight.shape[0]
    return LoadedModel(
        model=loaded,
        tokenizer=tokenizer,
        eos_token_ids=eos_token_ids(loaded, tokenizer, vocab_size),
        max_model_len=longest,
        vocab_size=vocab_size,
        device=device,
        weight_names=WeightNames.of(loaded, removed),
        num_weights=_num_weights(loaded),
        casts=config.dtype != "auto",
        limit=limit,
        quantize=quantize,
    )


def _refuse_where_int8_cannot_run(device: torch.device, config: EngineConfig, what: str) -> None:
    if device.type != "cpu" or config.exact == "off":
        reason = f"the device is {device}" if device.type != "cpu" else "exact is off"
        raise UnsupportedModelError(
            f"{what} computes in int8 by batch-invariant kernels that run on a CPU alone, and {reason}"
        )


def load_tokenizer(model: str | os.PathLike[str], *, trust_remote_code: bool) -> Any:
    """Load the tokenizer of `model`, a path, hub id or GGUF file. Raises BadCheckpointError for one that is none."""
    model = os.fspath(model)
    if is_gguf(model):
        return gguf_tokenizer(GgufFile(model))
    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise BadCheckpointError(
            f"{model} has no tokenizer that transformers reads: {in_a_line(error)}"
        ) from error


def _dtype(config: EngineConfig, hf_config: Any, gguf: GgufFile | None, *, is_decoded: bool) -> Any:
    """Return the type that is asked for; of decoded weights a CPU's 16 bits, whatever their scales are in."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    if gguf is not None:
        is_whole = all(tensor.kind.name == "F32" for tensor in gguf.tensors.values())
        return torch.float32 if is_whole else torch.bfloat16
    if is_decoded:
        named = getattr(hf_config, "dtype", None) or hf_config.get_text_config(decoder=True).dtype
        return torch.float32 if named == torch.float32 else torch.bfloat16
    return "auto"


def _fill_from_gguf(gguf: GgufFile, hf_config: Any, dtype: Any) -> Any:
    made = model_without_values(hf_config, dtype, attention=ATTENTION_NAME, trust_remote_code=False)
    try:
        fill(made, GgufSnapshot(gguf, made))
    except (BadSnapshotError, BadCheckpointError) as error:
        raise BadCheckpointError(f"{gguf.path.name} cannot be served: {error}") from error
    scale_frequencies(made, gguf)
    return made


def _fill_from_folder(
    model: str, hf_config: Any, described: Mapping[str, Any] | None, dtype: Any, trust_remote_code: bool
) -> tuple[Any, tuple[str, ...]]:
    """Return the text part of a model, its weights decoded where they are quantised, and what was left out of it."""
    folder = checkpoint_folder(model)
    made = model_without_values(
        hf_config, dtype, attention=ATTENTION_NAME, trust_remote_code=trust_remote_code
    )
    removed = keep_text_alone(made) or names_of_towers(hf_config)
    if described:
        log.info("its weights are decoded from %s into %s", described["quant_method"], made.dtype)
    if removed:
        log.info("text alone is served: %s is without %s", model, ", ".join(removed))
    try:
        stored: Snapshot = FolderSnapshot(folder)
        try:
            fill(
                made, DecodedSnapshot(stored, described, made.dtype) if described else stored, folder, removed
            )
        finally:
            stored.close()
    except (BadSnapshotError, BadCheckpointError) as error:
        kind = f"the {described['quant_method']} checkpoint" if described else "the checkpoint"
        raise BadCheckpointError(f"{kind} {model} cannot be served: {error}") from error
    return made, removed


def _load_weights(model: str, dtype: Any, trust_remote_code: bool) -> Any:
    """The model of transformers, every weight of it from the checkpoint."""
    load_causal: Any = AutoModelForCausalLM.from_pretrained
    try:
        with BUILDING:
            loaded, report = load_causal(
                model,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                attn_implementation=ATTENTION_NAME,
                output_loading_info=True,
            )
    except KeyError as error:
        if error.args != (ATTENTION_NAME,):
            raise
        # its classes of attention stand in a table of its own: GPT-J, GPT-Neo, Falcon
        raise UnsupportedModelError(
            f"{model} is of a kind that does not take its attention from transformers' AttentionInterface, so its "
            "requests cannot be batched; models of the Llama, Qwen, Mistral, Gemma, GPT-2, OLMo and MoE kinds do"
        ) from error
    except SafetensorError as error:
        raise BadCheckpointError(f"a file of {model} cannot be read as safetensors: {error}") from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" in str(error):
            wrong = "have other shapes than its config.json says"
        elif "conversion of the weights" in str(error):
            wrong = "are not whole: what becomes one tensor of the model (the experts of a layer) has parts missing"
        else:
            raise
        raise BadCheckpointError(
            f"weights of {model} {wrong}; transformers' report above names them"
        ) from error
    judge(loaded, report)
    return loaded


def _num_weights(model: Any) -> int:
    ends = {id(layer.weight) for layer in (model.get_input_embeddings(), model.get_output_embeddings())}
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in ends)


def resolve_device(device: str) -> str:
    """Return "cuda" or "cpu" for "auto", and any other name as it is."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


WITHOUT_POSITIONS = (
    32_768  # tokens of a context that a model without positions has, unless somebody asks for more
)
# As configs call layers that attend (with a window, chunks or neither), are recurrent, or do neither: those that may be
# tried. What a layer does is seen when the model is run (`model_structure`).
_LAYER_TYPES = {
    "full_attention", "sliding_attention", "chunked_attention", "attention", "linear_attention", "mamba", "conv",
    "hybrid", "moe", "mlp",
}  # fmt: skip


def refuse_what_cannot_be_packed(config: Any) -> None:
    """Refuse, by its config, a model whose state is not keys and values of a causal attention."""
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{config.model_type} is an encoder-decoder; only causal models can be served"
        )
    known = _LAYER_TYPES if index_limit(config) is None else _LAYER_TYPES | INDEXED
    strange = sorted(set(getattr(config, "layer_types", None) or ()) - known)
    if strange:
        raise UnsupportedModelError(
            f"{config.model_type} has layers of type {', '.join(strange)}{_what_they_are(config)}; the engine "
            "batches full, sliding-window and chunked attention, and recurrent layers"
        )


def _what_they_are(config: Any) -> str:
    """Return what a type's layers do, where its name does not tell: Qwen4's."""
    if not hasattr(config, "indexer_compress_ratio"):
        return ""
    return (
        ", whose index chooses blocks of keys by their mean, and layers that take in hashes of the last token ids by a "
        "dilated convolution"
    )


def index_limit_of(config: Any, longest: int, asked: int | None) -> str:
    """Return why a model's contexts of `longest` tokens are cut, where an index chooses in them; empty where none does.

    Raises UnsupportedModelError where more than what it takes whole is `asked` for.
    """
    topk = index_limit(config)
    if topk is None or longest <= topk:
        return ""
    why = f"beyond {topk} tokens an index chooses the keys of {config.model_type}, which is not computed here"
    if asked is not None and asked > topk:
        raise UnsupportedModelError(
            f"max_model_len is {asked}, and {why}; ask for at most {topk}, or leave it out"
        )
    return f"contexts of {topk} tokens; {why}"


def eos_token_ids(model: Any, tokenizer: Any, vocab_size: int) -> tuple[int, ...]:
    """Return every EOS id of the generation config, the model's config, or the tokenizer: of the first that has one.

    Ids that the model cannot draw (-1, or beyond its vocabulary) are left out with a warning. Raises
    BadCheckpointError for what is no id.
    """
    config = model.config.get_text_config(decoder=True)
    for source, named in (
        ("generation_config.json", getattr(model.generation_config, "eos_token_id", None)),
        ("config.json", getattr(config, "eos_token_id", None)),
        ("the tokenizer", tokenizer.eos_token_id),
    ):
        ids = _token_ids(named, source)
        known = tuple(dict.fromkeys(i for i in ids if 0 <= i < vocab_size))
        if len(known) < len(set(ids)):
            wrong = sorted(set(ids) - set(known))
            log.warning(
                "eos_token_id of %s names %s, of a vocabulary of %d: left out", source, wrong, vocab_size
            )
        if known:
            return known
    log.warning("no end-of-sequence token is known: completions end by max_tokens and stop strings alone")
    return ()


def _token_ids(named: Any, source: str) -> list[int]:
    """One id or several."""
    ids = list(named) if isinstance(named, list | tuple) else [] if named is None else [named]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise BadCheckpointError(f"eos_token_id of {source} must be an id or a list of ids, and is {named!r}")
    return ids


def context_length(config: Any, asked: int | None = None) -> int:
    """Return how many positions the model was made for. Raises UnsupportedModelError where its config has no number.

    One that is all states (Mamba-2) has no positions: it has as many as are `asked` for, or `WITHOUT_POSITIONS`.
    """
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"):
        if length := getattr(config, name, None):
            return int(length)
    if hasattr(config, "state_size") and not hasattr(config, "num_attention_heads"):
        return asked or WITHOUT_POSITIONS
    raise UnsupportedModelError(
        f"the config of {config.model_type} has no number for how long a context may be"
    )
