"""Anthropic's Messages API: read as a chat, answered as blocks."""
