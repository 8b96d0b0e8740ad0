"""SFT-Eraser: learn the trigger, and generate behind it."""

from lcdd.eraser.batches import EraserPrompt, MatchTarget, shared_tokens
from lcdd.eraser.eraser import SFTEraser
from lcdd.eraser.generation import (
    decode,
    embed_with_trigger,
    encode_prompts,
    evaluation_mode,
    generate,
    generate_ids,
    length_batches,
    response_hidden,
    right_padded,
    stream,
)
from lcdd.eraser.prefix import PrefixPatch, template_prefix
from lcdd.eraser.search import TriggerSearch
from lcdd.eraser.trigger import Prompt, Trigger, prompt_embeds

__all__ = [
    "EraserPrompt",
    "MatchTarget",
    "PrefixPatch",
    "Prompt",
    "SFTEraser",
    "Trigger",
    "TriggerSearch",
    "decode",
    "embed_with_trigger",
    "encode_prompts",
    "evaluation_mode",
    "generate",
    "generate_ids",
    "length_batches",
    "prompt_embeds",
    "response_hidden",
    "right_padded",
    "shared_tokens",
    "stream",
    "template_prefix",
]
