"""Modules whose class is exchanged on the instance: names, tensors and state_dict stay those of the original."""

import copy
from typing import Any, ClassVar

from torch import nn


class Swapped:
    """Mixed into such a class. A copy, by copy.deepcopy or pickle, is of the original class, without what is ours.

    _original: the class that instances had before. _ours: the attributes that they have gained.
    """

    _original: ClassVar[type[nn.Module]]
    _ours: ClassVar[tuple[str, ...]]

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        memo[id(self)] = copied = self._original.__new__(self._original)
        copied.__dict__.update(copy.deepcopy(self._kept(), memo))
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        return _made, (self._original,), self._kept()

    def _kept(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in self._ours}


def _made(original: type[nn.Module]) -> nn.Module:
    """An instance without attributes, for pickle to fill."""
    return original.__new__(original)
