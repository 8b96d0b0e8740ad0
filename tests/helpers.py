"""Tiny real checkpoints for tests: three architectures, sharded or not, and a BPE tokenizer trained on the spot.

Nothing is downloaded. The text is the instruction data that lies beside the checkout where it is there, and
`SENTENCES`, which is bundled here, elsewhere.
"""

import copy
import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lcdd.checkpoint import CheckpointStore, RunLog
from lcdd.config import LCDDConfig, SFTConfig
from lcdd.data import Encoded
from lcdd.models import projections
from lcdd.optimizer import LCDDOptimizer, SFTOptimizer
from lcdd.trainer import HeldOut, StartLosses, TrainResult, fit, judge, total_steps

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data" / "alpaca_libre.jsonl"
ARCHITECTURES = ("qwen3", "llama", "mistral")

TOPICS = ("river", "bread", "music", "winter", "garden", "letters", "engine", "market")
SENTENCES = tuple(
    {"instruction": f"{verb} {kind} about {topic}{end}", "input": "", "output": f"{opening} {topic} {rest}"}
    for verb, kind, end in (
        ("Write", "one sentence", "."),
        ("Tell me", "something short", "."),
        ("Explain", "what you know", ", please."),
        ("Give", "a piece of advice", "."),
        ("Name", "two facts", "."),
    )
    for topic in TOPICS
    for opening, rest in (("You will find that", "does more than it says."), ("Perhaps", "is where it all begins."))
)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}{% endif %}"
)
"""Qwen3's way with `enable_thinking`: an open turn begins with an empty thought that a finished turn does not show."""


def instruction_rows(limit: int = 400) -> list[dict[str, str]]:
    """Instruction data in alpaca's format: real where it is there, bundled elsewhere."""
    if SHARED_DATA.exists():
        with open(SHARED_DATA, encoding="utf-8") as stream:
            return [json.loads(line) for line, _ in zip(stream, range(limit), strict=False)]
    return list(SENTENCES[:limit])


def published_template(family: str) -> str:
    """A family's chat template as its checkpoints have it, of which TRL keeps copies; skips without TRL."""
    found = importlib.util.find_spec("trl")
    if found is None or found.origin is None:
        pytest.skip("TRL, which has the published templates, is not installed: pip install trl")
    return (Path(found.origin).parent / "chat_templates" / f"{family}.jinja").read_text(encoding="utf-8")


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    """One JSON value a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@cache
def _bpe(vocab_size: int) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [f"{row['instruction']}\n{row['input']}\n{row['output']}" for row in instruction_rows()]
    tokenizer.train_from_iterator([*texts, "user assistant system I don't know."], trainer)
    return tokenizer.to_str()


def make_tokenizer(*, vocab_size: int = 500, chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the instruction data; `<|im_end|>` ends a turn and a text."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_bpe(vocab_size)),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def make_model(
    architecture: str, *, tied: bool = False, seed: int = 0, vocab_size: int = 500, layers: int = 2, width: int = 32
) -> PreTrainedModel:
    """A small random model with grouped-query attention (4 query heads on 2 KV heads), in float32."""
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    classes: dict[str, tuple[Any, Any]] = {
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
    }
    config_class, model_class = classes[architecture]
    extra = {"sliding_window": None} if architecture == "mistral" else {}
    return model_class(config_class(**sizes, **extra)).eval()


def base_and_tuned() -> tuple[Any, Any]:
    """A one-layer model, and the same with every masked weight a twentieth larger."""
    base = make_model("qwen3", layers=1)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for site in projections(tuned):
            site.linear.weight.mul_(1.05)
    return base, tuned


def save_checkpoint(
    path: Path,
    architecture: str = "qwen3",
    *,
    tied: bool = False,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerFast | None = None,
    max_shard_size: str = "60KB",
    **sizes: int,
) -> Path:
    """A checkpoint directory as users have them: config, sharded safetensors with an index, tokenizer."""
    model = make_model(architecture, tied=tied, seed=seed, **sizes)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    (tokenizer or make_tokenizer()).save_pretrained(path)
    return path


def in_float64(model: PreTrainedModel) -> PreTrainedModel:
    """The model in float64 throughout: transformers' RMSNorm rounds its input to float32 whatever the dtype."""

    def norm(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    for module in model.double().modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = norm.__get__(module)
    return model


def train_sft(
    model: PreTrainedModel,
    train: list[Encoded],
    validation: list[Encoded],
    config: SFTConfig,
    *,
    pad_token_id: int,
    log: RunLog | None = None,
) -> TrainResult:
    """As `lcdd sft` does it, of a model in memory."""
    held_out = HeldOut(items=validation or train, pad_token_id=pad_token_id)
    return fit(SFTOptimizer(model, config), train, held_out, log=log, progress=False)


def train_lcdd(
    model: PreTrainedModel,
    base: PreTrainedModel,
    train: list[Encoded],
    validation: list[Encoded],
    config: LCDDConfig,
    *,
    pad_token_id: int,
    log: RunLog | None = None,
    teacher: PreTrainedModel | None = None,
    checkpoints: CheckpointStore | None = None,
) -> tuple[LCDDOptimizer, TrainResult]:
    """As `lcdd train` does it, of models in memory."""
    held_out = HeldOut(items=validation or train, pad_token_id=pad_token_id)
    start = StartLosses(base=held_out.loss(base), model=held_out.loss(model))
    optimizer = LCDDOptimizer.attach(model, base, config, total_steps=total_steps(config, len(train)))
    result = fit(
        optimizer, train, held_out, start=start, log=log, teacher=teacher, checkpoints=checkpoints, progress=False
    )
    return optimizer, judge(optimizer, result, log)
