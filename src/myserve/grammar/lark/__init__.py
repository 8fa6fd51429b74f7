"""Lark grammars of one text, read so that they can be written again where the text stands in something else."""
