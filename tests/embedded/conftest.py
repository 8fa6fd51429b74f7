"""The embedded model, loaded once for all of this folder's tests."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from myserve.embedded import embedded_model_path


@pytest.fixture(scope="session")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(embedded_model_path(), dtype="auto")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(embedded_model_path())
