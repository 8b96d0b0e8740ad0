"""An attached model is watched: what would silently use or save sampled gates is an error, as is a second attach.

The model's hooks know the watch, and the watch knows the optimizer weakly: the model keeps no optimizer alive. A copy
of the model, by copy.deepcopy or pickle, is an ordinary model.
"""

import weakref
from typing import Any, Protocol

import torch
from torch import nn

from lcdd.errors import InputError

_WATCHES: "weakref.WeakKeyDictionary[nn.Module, Watch]" = weakref.WeakKeyDictionary()
"""Attached models."""


class Watched(Protocol):
    """An optimizer, as far as it is looked at here."""

    def heed_writes(self) -> None:
        """Take in, or refuse, weights that somebody else has written."""


class Watch:
    """The hooks on an attached model.

    sampled: whether its weights hold W_eff of gates that were sampled for training.
    """

    def __init__(self, model: nn.Module, optimizer: Watched) -> None:
        self.sampled = False
        self._optimizer = weakref.ref(optimizer)
        self._handles = [
            model.register_forward_pre_hook(self._before_forward),
            model.register_state_dict_pre_hook(self._before_state_dict),
        ]
        _WATCHES[model] = self

    def close(self, model: nn.Module) -> None:
        """Leave nothing of ours in the model."""
        for handle in self._handles:
            handle.remove()
        _WATCHES.pop(model, None)

    def _before_forward(self, model: nn.Module, _args: Any) -> None:
        if self.sampled and not model.training:
            raise RuntimeError(
                "the model is in evaluation mode, its weights on the sampled gates of training: to evaluate, call "
                "optimizer.eval() first; to train, call model.train()"
            )
        if torch.compiler.is_compiling() or not (model.training and torch.is_grad_enabled()):
            return
        if (optimizer := self._optimizer()) is not None:
            optimizer.heed_writes()

    def _before_state_dict(self, *_args: Any) -> None:
        self._refuse("saving them")

    def __deepcopy__(self, memo: dict[int, Any]) -> "Watch":
        self._refuse("copying the model")
        return _blind()

    def __reduce__(self) -> tuple[Any, ...]:
        self._refuse("saving the model")
        return _blind, ()

    def _refuse(self, action: str) -> None:
        if self.sampled:
            raise RuntimeError(
                f"the model's weights hold the sampled gates of training; call optimizer.eval() before {action}"
            )


def check_unwatched(model: nn.Module) -> None:
    """Raise InputError if the model is attached to an optimizer."""
    if model in _WATCHES:
        raise InputError(
            "model: expected one without an LCDDOptimizer, got one that is attached already; call the other's fold() "
            "or detach() first"
        )


def _blind() -> Watch:
    """The watch of a copy, which nobody trains."""
    watch = Watch.__new__(Watch)
    watch.sampled, watch._optimizer, watch._handles = False, lambda: None, []  # type: ignore[assignment]
    return watch
