"""What kinds of models are served, tried with a tiny one of each: `python -m tools.models`."""
