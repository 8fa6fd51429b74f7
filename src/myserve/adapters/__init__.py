"""The sampler behind other frameworks' interfaces: one file a framework, which is not imported by it."""
