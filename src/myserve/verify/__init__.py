"""Tests any OpenAI-compatible sampler from outside, by the public wire alone."""
