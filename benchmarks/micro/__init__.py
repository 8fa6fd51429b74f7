"""Parts alone: attention, the sampler."""
