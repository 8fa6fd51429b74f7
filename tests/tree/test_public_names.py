"""What docs/stability.md promises: the public modules and the names of each. A change here is a release note."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module

import pytest

from tree.package import ROOT

PUBLIC = {
    name: names.split()
    for name, names in {
        "myserve": """
            Engine EngineConfig SamplingParams SubmitOptions __version__ completion_logits exact_forward
            exact_logprobs replay_routing
        """,
        "myserve.sdk": """
            AdaptiveConcurrencyController Alternative BatchGroup Completions Conversation Decisions
            DeploymentSampler FixedConcurrencyController JournalError QuestionAnswer RetryPolicy SampleBatch
            SampleDelta SampleOptions SampledCompletion SamplerStats SamplingDeadlineError SamplingError
            StepSummary Trajectory WeightUpdateError
        """,
        "myserve.sdk.testing": """
            FakeToken NextToken ScriptedTransport ToyTokenizer fake_events scripted tiny_model
        """,
        "myserve.sdk.mismatch": "Against Gap Kind Mismatch Verdict measure plot_mismatch",
        "myserve.sdk.records": """
            Journal JournalError aligned_routing read_parquet routing_array to_columns write_parquet
        """,
        "myserve.adapters.trl": "Rollouts trl_rollout_func",
        "myserve.adapters.tinker": "ModelInput SamplerTokenCompleter TokensWithLogprobs",
        "myserve.adapters.verl": "RolloutServer register",
        "myserve.engine": """
            Delta Engine EngineConfig KeptSet PromptLogprob RequestMetrics SubmitOptions TokenOutput
        """,
        "myserve.core.sampling": """
            RowState Sampled Sampler SamplerCfg SamplingParams apply_penalties sample_next
            top_k_top_p_filter
        """,
        "myserve.core.generate": "Step greedy_generate sample_generate",
        "myserve.errors": """
            BadAdapterError BadSnapshotError ConstraintError ContextLengthError EngineDeadError EngineError
            ModelNotFoundError MyserveError NonFiniteLogitsError NotEnoughMemoryError OverloadedError
            RequestError RequestFailedError UnsupportedModelError WeightsLoadingError
        """,
        "myserve.embedded": "embedded_model_path",
        "myserve.main": "app",
    }.items()
}
WITHOUT_TORCH = [
    "myserve",
    "myserve.sdk",
    "myserve.sdk.testing",
    "myserve.errors",
    "myserve.embedded",
    "myserve.engine",
]


def test_the_page_lists_these_modules() -> None:
    page = (ROOT / "docs" / "stability.md").read_text()
    section = re.search(r"^## Python\n(.*?)^## ", page, re.MULTILINE | re.DOTALL)
    assert section
    assert re.findall(r"^\| `([\w.]+)` \|", section[1], re.MULTILINE) == list(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_module_has_these_names(name: str) -> None:
    module = import_module(name)
    assert sorted(module.__all__) == PUBLIC[name]
    for public in module.__all__:
        assert getattr(module, public) is not None


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_importing_it_imports_no_torch(name: str) -> None:
    code = f"import sys, {name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_package_is_typed() -> None:
    assert (ROOT / "src" / "myserve" / "py.typed").exists()
