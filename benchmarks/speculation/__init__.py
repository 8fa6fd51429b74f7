"""Drafts beside no drafts, ours and the peers': what they gain, and whether any answer differs."""
