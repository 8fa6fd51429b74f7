"""`myserve bench`: measures any OpenAI-compatible server under load. Runs on the base install: no torch."""
