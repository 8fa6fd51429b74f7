"""Versions of weights are numbers that grow; clients may call them what they like."""

from __future__ import annotations

__all__ = ["VersionLabels"]


class VersionLabels:
    """The names that clients have given to versions; one without a name goes by its number. Any thread may ask.

    >>> labels = VersionLabels()
    >>> labels.set(2, "step-7")
    >>> labels.of(1), labels.of(2)
    ('1', 'step-7')
    """

    def __init__(self, names: dict[int, str] | None = None) -> None:
        self._names = dict(names or {})

    def of(self, version: int) -> str:
        """Return what a version is called."""
        return self._names.get(version, str(version))

    def set(self, version: int, label: str) -> None:
        """Call a version by this name from now on."""
        self._names[version] = label

    def copy(self) -> VersionLabels:
        """Return the same names, for an engine that takes the place of this one's."""
        return VersionLabels(self._names)

    @staticmethod
    def number(label: str | None, current: int) -> int | None:
        """Return the version that a label names itself: a number above the current one. None: the next is taken.

        >>> [VersionLabels.number(label, 7) for label in ("9", "7", "step-9", "09", None)]
        [9, None, None, None, None]
        """
        if label is None or not (label.isascii() and label.isdigit()) or len(label) > 18:
            return None
        number = int(label)
        return number if str(number) == label and number > current else None
