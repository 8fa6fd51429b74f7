"""The words of OpenAI's Responses API."""
