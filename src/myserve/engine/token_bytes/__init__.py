"""Token ids to text: the bytes of every token, and readers that turn a completion's ids into its text."""

from myserve.engine.token_bytes.readers import Reader, Utf8Reader
from myserve.engine.token_bytes.spellings import byte_level_alphabet
from myserve.engine.token_bytes.table import TokenBytes

__all__ = ["Reader", "TokenBytes", "Utf8Reader", "byte_level_alphabet"]
