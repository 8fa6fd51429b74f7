"""What every test may lean on: tiny random models of each architecture, with a tokenizer trained here."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import certifi
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from model_zoo import HYBRIDS, SERVED
from myserve.engine.steps import recordings
from myserve.engine.steps.recordings import likely_shapes

if TYPE_CHECKING:
    from myserve.engine.engine import Engine

pytest_plugins = ["own_process"]

# What is imported and collected stays: to look through it again and again takes seconds, here and in every test
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


CORPUS = [
    "The quick brown fox jumps over the lazy dog. Hello, hello world! One, two, three, four.",
    "Zß🦄你好，世界 é e\u0301 naïve Übergröße данные 日本語テキスト 👩‍👩‍👧‍👦 🇩🇪",
    "Solve: 2+2= 4. Say a color: red, green, blue. Count to three: one, two, three.",
    "user assistant system tool user\n assistant\n",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCAB_SIZE = 384  # 256 bytes, the special tokens and about a hundred merges

SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,  # random, but not flat: the argmax and the nucleus mean something
}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_experts": 8}
ARCHITECTURES: dict[str, dict[str, object]] = {
    "llama": SMALL,
    "qwen2": SMALL,
    "qwen3": SMALL,
    "mistral": SMALL | {"sliding_window": 24},
    "gemma2": SMALL | {"sliding_window": 24, "query_pre_attn_scalar": 8},
    "gemma3_text": SMALL | {"sliding_window": 24, "query_pre_attn_scalar": 8},
    "olmo2": SMALL,
    "starcoder2": SMALL | {"sliding_window": None},
    "gpt2": {
        "vocab_size": VOCAB_SIZE,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 512,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "initializer_range": 0.2,
    },
    "qwen3_moe": SMALL | MOE | {"decoder_sparse_step": 1, "mlp_only_layers": []},
    "mixtral": SMALL | {"num_experts_per_tok": 2, "num_local_experts": 4},
    "olmoe": SMALL | MOE,
    "phi3": SMALL | {"pad_token_id": 0},
    "gpt_oss": SMALL
    | {"num_experts_per_tok": 2, "num_local_experts": 4, "sliding_window": 24, "rope_scaling": None},
}
GPT_OSS = {
    "vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
    "sliding_window": 24, "initializer_range": 0.2, "pad_token_id": 0, "rope_scaling": None,
}  # fmt: skip
# Of an architecture above, with a change: more experts than a byte can name; trained on 64 positions, stretched to 256.
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "longrope": (
        "phi3",
        {
            "max_position_embeddings": 256,
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 4,
                "long_factor": [1.0, 2.0, 5.0, 20.0],
            },
        },
    ),
    # Widths that are no multiple of a vector, and activations that PyTorch computes otherwise at a vector's end.
    "odd_llama": ("llama", {"intermediate_size": 1023}),
    "odd_gemma3": ("gemma3_text", {"intermediate_size": 1000, "hidden_size": 64}),
    "odd_starcoder2": ("starcoder2", {"intermediate_size": 100}),
    "wide_moe": ("qwen3_moe", {"num_experts": 300, "num_experts_per_tok": 4, "moe_intermediate_size": 8}),
}


@pytest.fixture(autouse=True, scope="session")
def _few_shapes_are_recorded_ahead() -> Iterator[None]:
    """An idle engine records some 140 likely shapes, seconds of CPU each time; the hundreds of engines here, four.

    tests/engine/steps/test_recordings.py asks for all of them.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recordings, "likely_shapes", lambda: islice(likely_shapes(), 4))
        yield


@cache
def trained_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 384 tokens: complete over bytes, so that any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_tiny_model(arch: str, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Write a random model of `arch` with its tokenizer, as `save_pretrained` writes any model."""
    torch.manual_seed(seed)
    if arch in (zoo := SERVED | HYBRIDS):
        arch, described = zoo[arch]
    else:
        arch, change = VARIANTS.get(arch, (arch, {}))
        described = ARCHITECTURES[arch] | change
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **described)).to(dtype)
    model.save_pretrained(folder)
    trained_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _self_tests_are_kept_by_tests_that_patch_nothing(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """No self-test is taken over where a test patches: what it breaks must be found, and not be passed on."""
    folder = None if "monkeypatch" in request.fixturenames else tmp_path_factory.getbasetemp() / "passed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("myserve.engine.runner.kept_self_test.cache_folder", lambda: folder)
        yield


@pytest.fixture(autouse=True, scope="session")
def _one_authority_is_enough(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Each `httpx.get` reads the world's certificates, 34 ms of CPU; no test meets a server of the world."""
    first = Path(certifi.where()).read_text().partition("-----END CERTIFICATE-----")
    file = tmp_path_factory.mktemp("authority") / "one.pem"
    file.write_text("".join(first[:2]) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(file))
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_model("llama")` is a folder with a two-layer random model, made once a session."""

    @cache
    def make(arch: str) -> Path:
        return make_tiny_model(arch, tmp_path_factory.mktemp(arch))

    return make


@pytest.fixture(scope="session")
def hub_cache(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub cache as a download leaves it, with a GPT-2 of ours as sshleifer/tiny-gpt2; it has no chat template."""
    folder = tmp_path_factory.mktemp("hub") / "models--sshleifer--tiny-gpt2"
    commit = "5f91d94bd9cd7190a9f3216ff93cd1dd95f2c7be"
    snapshot = folder / "snapshots" / commit
    for part in (snapshot, folder / "blobs", folder / "refs"):
        part.mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    for file in tiny_model("gpt2").iterdir():
        if file.name == "chat_template.jinja":
            continue
        data = file.read_bytes()
        blob = folder / "blobs" / hashlib.sha256(data).hexdigest()
        blob.write_bytes(data)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    return folder.parent


@pytest.fixture
def offline(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is that cache and nothing else, as with HF_HUB_CACHE and HF_HUB_OFFLINE=1 at start."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub_cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def make_engine(tiny_model: Callable[[str], Path]) -> Iterator[Callable[..., Engine]]:
    """`make_engine("llama", num_blocks=8)`: one engine for each set of arguments, shut down at the end."""
    from myserve.engine.config import EngineConfig  # here, for the SDK's tests need none of it
    from myserve.engine.engine import Engine

    engines: dict[tuple[object, ...], Engine] = {}

    def make(arch: str = "llama", **config: object) -> Engine:
        key = (arch, *sorted(config.items()))
        if key not in engines:
            engines[key] = Engine.from_pretrained(
                str(tiny_model(arch)), EngineConfig(**({"num_blocks": 128} | config))
            )
        return engines[key]

    yield make
    for engine in engines.values():
        engine.scheduler.check_integrity()
        engine.shutdown()


@pytest.fixture(scope="session")
def hf_model(tiny_model: Callable[[str], Path]) -> Callable[[str], torch.nn.Module]:
    """transformers' own model of the same folder, untouched: the judge."""
    return lambda arch: AutoModelForCausalLM.from_pretrained(tiny_model(arch)).eval()


@pytest.fixture(scope="session")
def load(tiny_model: Callable[[str], Path]) -> Callable[..., Any]:
    """`load("gpt_oss", torch.bfloat16)`: a tiny model as transformers makes it."""

    def load_(arch: str, dtype: torch.dtype = torch.float32) -> Any:
        if arch != "gpt_oss":
            return AutoModelForCausalLM.from_pretrained(tiny_model(arch), dtype=dtype).eval()
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **GPT_OSS)).to(dtype).eval()
        for name, parameter in model.named_parameters():
            if "sinks" in name:
                torch.nn.init.normal_(parameter)
        return model

    return load_
