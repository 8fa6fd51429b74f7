"""OpenAI's Responses API: read as a chat, answered as items."""
