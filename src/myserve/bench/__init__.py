"""`myserve bench`: what any OpenAI-compatible server does under load. Runs on the base install: no torch."""
