"""The runs of tokens that one version of the weights made, by its name, as vLLM and SGLang write them."""

from __future__ import annotations

from collections.abc import Sequence

from myserve.engine.outputs import TokenOutput
from myserve.server.answers.answer import weight_version_spans
from myserve.server.models.labels import VersionLabels
from myserve.wire.responses import VersionSpan

__all__ = ["weight_versions"]


def weight_versions(tokens: Sequence[TokenOutput], labels: VersionLabels) -> list[VersionSpan]:
    """Return the runs of a completion's tokens.

    >>> made = [TokenOutput(1, 0.0, 0.0, weight_version=version) for version in (3, 3, 4)]
    >>> weight_versions(made, VersionLabels({4: "step-7"}))
    [{'version': '3', 'start': 0, 'end': 2}, {'version': 'step-7', 'start': 2, 'end': 3}]
    """
    spans: list[VersionSpan] = []
    for span in weight_version_spans(tokens):
        named: VersionSpan = {
            "version": labels.of(span["weight_version"]),
            "start": span["start"],
            "end": span["end"],
        }
        if "adapter_version" in span:
            named["adapter_version"] = span["adapter_version"]
        if span.get("recomputed"):
            named["recomputed"] = True
        spans.append(named)
    return spans
