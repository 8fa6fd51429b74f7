"""Benchmarks and soaks. README.md describes them, LEDGER.md holds their results."""
