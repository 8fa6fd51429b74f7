"""Prompts for a base model whose answers copy from the prompt, and prompts whose answers are free."""

from __future__ import annotations

__all__ = ["COPYING", "FREE"]

_CODE = '''def read_rows(path):
    """Return the rows of a file as lists of numbers."""
    rows = []
    with open(path) as lines:
        for number, line in enumerate(lines, 1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            try:
                rows.append([float(field) for field in line.split(",")])
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
    return rows
'''
_EDITED = _CODE.replace("rows", "records").splitlines()
_RECORDS = [
    ("Ada Lovelace", "London", 1815, "mathematician"),
    ("Alan Turing", "London", 1912, "mathematician"),
    ("Grace Hopper", "New York", 1906, "admiral"),
    ("Emmy Noether", "Erlangen", 1882, "algebraist"),
    ("Kurt Gödel", "Brünn", 1906, "logician"),
]
_AS_JSON = "\n".join(
    f'{{"name": "{name}", "born_in": "{place}", "year": {year}, "profession": "{work}"}}'
    for name, place, year, work in _RECORDS
)
_AS_YAML = "\n".join(
    f"- name: {name}\n  born_in: {place}\n  year: {year}\n  profession: {work}"
    for name, place, year, work in _RECORDS[:2]
)
_SPEECH = (
    "The lighthouse at the northern end of the bay was built in three summers by forty masons from the villages "
    "around it, who carried the granite down from the quarry on sledges, because no road led there. Its lamp burned "
    "rape oil until the year in which the railway came, and paraffin after that, and the keeper's daughter, who had "
    "learned to trim the wick before she learned to read, kept a diary of every ship that passed for sixty-one years."
)
_LETTER = (
    "Dear Mrs. Halloran,\nthank you for your letter of the third of March. We have looked into the delivery of the two "
    "armchairs and found that they left our warehouse in Leeds on the ninth of February, and that the carrier could "
    "not find anyone at home on the twelfth, the thirteenth and the sixteenth. They are now at the depot in Bradford, "
    "where they will be kept until the end of the month.\nYours sincerely,\nTheodore Brackenridge"
)

COPYING: dict[str, str] = {
    "edit code": (
        f"Here is a function:\n```python\n{_CODE}```\nHere is the same function, with `rows` renamed to `records`:\n"
        "```python\n" + "\n".join(_EDITED[:3]) + "\n"
    ),
    "reformat JSON": (f"JSON:\n{_AS_JSON}\n\nThe same as YAML:\n{_AS_YAML}\n"),
    "quote": f"{_SPEECH}\n\nOnce more, word for word:\n\n{' '.join(_SPEECH.split()[:8])}",
    "repeat a letter": f"The letter:\n{_LETTER}\n\nA copy of the letter:\n{' '.join(_LETTER.split(' ')[:6])}",
}
FREE: dict[str, str] = {
    "story": "Once upon a time, in a small village at the foot of a mountain, there lived an old clockmaker who",
    "explain": "Photosynthesis is the process by which plants",
    "list": "Ten things to do on a rainy Sunday afternoon:\n1.",
    "essay": "The causes of the First World War have been debated by historians for a century. The most important",
}
