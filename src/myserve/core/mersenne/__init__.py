"""The Mersenne Twister that torch draws with on a CPU, moved on by any number of words without making them."""
