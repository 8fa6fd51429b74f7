"""A fuzzer of parameter combinations: random requests over all fields at once, judged by a plain loop."""
