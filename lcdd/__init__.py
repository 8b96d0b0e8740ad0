"""LCDD and SFT-Eraser: reversible fine-tuning as an optimizer, a carrier patch and a soft-prompt trigger.

Public names are loaded when they are used (PEP 562): `import lcdd` loads no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_ROOM_OF = {
    "LCDDOptimizer": "optimizer",
    "LCDDConfig": "config",
    "SFTConfig": "config",
    "EraserConfig": "config",
    "Carrier": "carrier",
    "Trigger": "eraser",
    "SFTEraser": "eraser",
    "generate": "eraser",
    "stream": "eraser",
    "prompt_embeds": "eraser",
    "load_model": "models",
    "load_tokenizer": "models",
    "evaluate": "evaluate",
}
__all__ = [
    "Carrier",
    "EraserConfig",
    "LCDDConfig",
    "LCDDOptimizer",
    "SFTConfig",
    "SFTEraser",
    "Trigger",
    "__version__",
    "evaluate",
    "generate",
    "load_model",
    "load_tokenizer",
    "prompt_embeds",
    "stream",
]

if TYPE_CHECKING:
    from lcdd.carrier import Carrier
    from lcdd.config import EraserConfig, LCDDConfig, SFTConfig
    from lcdd.eraser import SFTEraser, Trigger, generate, prompt_embeds, stream
    from lcdd.evaluate import evaluate
    from lcdd.models import load_model, load_tokenizer
    from lcdd.optimizer import LCDDOptimizer


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'lcdd' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lcdd.{_ROOM_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_ROOM_OF])
