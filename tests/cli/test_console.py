"""A token's colour is its probability's, also where several tokens make a character."""

from __future__ import annotations

from myserve.cli.console import ProbabilityPrinter, colour_of, legend


def test_colours_follow_probability_and_the_least_likely_part_of_a_character():
    printer = ProbabilityPrinter()
    entries = [
        {"bytes": [97], "logprob": -0.01},
        {"bytes": [0xC3], "logprob": -9.0},
        {"bytes": [0xA9], "logprob": 0.0},
    ]
    entries.append({"bytes": None, "logprob": -0.5})  # a token without text: an end
    text = printer.all(entries)
    assert text.plain == "aé"
    assert [str(span.style) for span in text.spans] == ["green", "red"]


def test_every_probability_has_a_colour_and_the_legend_names_all() -> None:
    colours = [colour_of(p) for p in (1.0, 0.9, 0.6, 0.3, 0.1, 0.05, 0.0)]
    assert len(set(colours)) == 5
    assert {str(span.style) for span in legend().spans} >= set(colours)
