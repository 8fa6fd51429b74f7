"""The words of Anthropic's Messages API."""
