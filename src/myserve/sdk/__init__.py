"""The client SDK: token-level samples from inference servers, for RL, DPO and evals. Needs no torch."""

from myserve.sdk.batch import BatchGroup, SampleBatch
from myserve.sdk.concurrency.controllers import (
    AdaptiveConcurrencyController,
    FixedConcurrencyController,
    StepSummary,
)
from myserve.sdk.conversation import Conversation, Trajectory
from myserve.sdk.errors import SamplingDeadlineError, SamplingError
from myserve.sdk.options import SampleOptions
from myserve.sdk.records.journal import JournalError
from myserve.sdk.retry import RetryPolicy
from myserve.sdk.sampler import DeploymentSampler
from myserve.sdk.sampling.decisions import Decisions, QuestionAnswer
from myserve.sdk.types import Alternative, Completions, SampledCompletion, SampleDelta, SamplerStats
from myserve.sdk.weights import WeightUpdateError

__all__ = [
    "AdaptiveConcurrencyController",
    "Alternative",
    "BatchGroup",
    "Completions",
    "Conversation",
    "Decisions",
    "DeploymentSampler",
    "FixedConcurrencyController",
    "JournalError",
    "QuestionAnswer",
    "RetryPolicy",
    "SampleBatch",
    "SampleDelta",
    "SampleOptions",
    "SampledCompletion",
    "SamplerStats",
    "SamplingDeadlineError",
    "SamplingError",
    "StepSummary",
    "Trajectory",
    "WeightUpdateError",
]
