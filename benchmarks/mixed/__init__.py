"""Forty requests that have nothing in common give the same bits alone, in company, after a restart, on any threads."""
