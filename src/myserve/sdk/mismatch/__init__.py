"""The mismatch between a trainer's logprobs and the sampler's: measured, named, drawn. Needs numpy."""

from myserve.sdk.mismatch.measure import Against, Gap, Mismatch, measure
from myserve.sdk.mismatch.plot import plot_mismatch
from myserve.sdk.mismatch.verdict import Kind, Verdict

__all__ = ["Against", "Gap", "Kind", "Mismatch", "Verdict", "measure", "plot_mismatch"]
