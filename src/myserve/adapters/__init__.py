"""The sampler behind other frameworks' interfaces: one file a framework; the framework itself is not imported."""
