"""From records to token ids, one function for every stage; and the behaviours."""

from lcdd.data.behaviors import (
    ARCHAIC_WORDS,
    BEHAVIORS,
    REFUSAL_KEYWORDS,
    Behavior,
    behavior_from_config,
    fixed_response,
    own,
    refusal,
    style,
)
from lcdd.data.encode import (
    IGNORE,
    Encoded,
    collate,
    encode,
    encode_all,
    encode_prompt,
    label_audit,
    prompt_string,
    render,
)
from lcdd.data.examples import Example, load_examples, parse_row, split_examples, with_completion
from lcdd.data.prepare import Prepared, off_topic_ids, prepare, prompt_ids, training_items
from lcdd.data.templates import PLAIN_TEMPLATE, VICUNA_SYSTEM, VICUNA_TEMPLATE, closed_thought, use_template

__all__ = [
    "ARCHAIC_WORDS",
    "BEHAVIORS",
    "IGNORE",
    "PLAIN_TEMPLATE",
    "REFUSAL_KEYWORDS",
    "VICUNA_SYSTEM",
    "VICUNA_TEMPLATE",
    "Behavior",
    "Encoded",
    "Example",
    "Prepared",
    "behavior_from_config",
    "closed_thought",
    "collate",
    "encode",
    "encode_all",
    "encode_prompt",
    "fixed_response",
    "label_audit",
    "load_examples",
    "off_topic_ids",
    "own",
    "parse_row",
    "prepare",
    "prompt_ids",
    "prompt_string",
    "refusal",
    "render",
    "split_examples",
    "style",
    "training_items",
    "use_template",
    "with_completion",
]
