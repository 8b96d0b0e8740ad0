"""LCDD and SFT-Eraser: reversible fine-tuning as an optimizer, a carrier patch and a soft-prompt trigger."""

__version__ = "0.1.0"
