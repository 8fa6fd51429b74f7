"""Draws recorded samples again, token by token, and says what differs and why."""
