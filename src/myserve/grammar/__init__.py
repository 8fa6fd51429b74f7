"""Grammars, compiled: llguidance behind a small surface. Imports no torch, so that a worker process is light."""
