"""Proves `myserve verify`: a server of ours with one thing broken at a time, and many runs with nothing broken."""
