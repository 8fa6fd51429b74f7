"""OpenAI's files and batches: lines of requests, answered while nobody waits."""
