"""Shared parts of the examples: the server, the task, the trainer's model, the table that grows."""
