"""Every family of decoders that transformers has and LCDD can mask, as a two-layer random model put through its paces.

    python -m benchmarks.families                    the table, about a second a family
    python -m benchmarks.families llama gpt2         some of them
    python -m benchmarks.families --write            also into docs/models.md and, kind by kind, into the README

For each: the probe at load; six LCDD steps; the carrier, read back from its file, on the base = the trained model bit
for bit, and every byte of the base back after it; an eraser step over a batch = one prompt at a time (loss and
gradient); the trigger's logits through PEFT = ours. Then what is refused, and why. Exit code 1 if anything fails.
"""

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from lcdd.carrier import Carrier
from lcdd.config import EraserConfig, LCDDConfig
from lcdd.eraser import SFTEraser, Trigger, prompt_embeds
from lcdd.errors import InputError
from lcdd.models import head_of, packed_rows, packs, probe, sites_of, skeleton_of
from lcdd.optimizer import LCDDOptimizer

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"
VOCABULARY, PAD, BOS, EOS = 61, 0, 1, 2
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "n_embd": 32, "d_model": 32, "intermediate_size": 40, "n_inner": 40,
    "ffn_dim": 40, "ffn_hidden_size": 40, "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "n_positions": 64, "max_seq_len": 64, "pad_token_id": PAD, "bos_token_id": BOS,
    "eos_token_id": EOS, "initializer_range": 0.2, "sliding_window": 6,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24,
}  # fmt: skip
"""Of every family, as far as its config has them: two layers, grouped queries, windows that prompts are longer than."""


@dataclass(frozen=True, eq=False)
class Family:
    """label: what people call it. model_type: transformers' name. sites: what is special. settings: beside `SIZES`."""

    label: str
    model_type: str
    sites: str
    settings: dict[str, Any]

    def config(self) -> Any:
        """A config of the smallest sizes, of those that the family's has."""
        known = AutoConfig.for_model(self.model_type)
        mapped = set(getattr(known, "attribute_map", {}))
        computed = {name for name in SIZES if isinstance(getattr(type(known), name, None), property)}
        sizes = {name: value for name, value in SIZES.items() if name not in mapped | computed and hasattr(known, name)}
        return AutoConfig.for_model(self.model_type, **{**sizes, **self.settings})

    def model(self) -> PreTrainedModel:
        """With random weights in float32."""
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(self.config(), dtype=torch.float32).eval()


def family(label: str, model_type: str, sites: str = "ordinary", **settings: Any) -> Family:
    return Family(label, model_type, sites, settings)


FUSED, BY_HEAD, TRANSPOSED, PLAIN, MOE = "fused rows", "fused, by head", "transposed", "no gate_proj", "experts"
SOFTCAP, SCALED = "capped logits", "scaled logits"
FAMILIES = [
    family("Qwen2, Qwen2.5", "qwen2"),
    family("Qwen3", "qwen3"),
    family("Llama 1-3.x, SmolLM 1-2, Vicuna, DeepSeek-R1-Distill", "llama"),
    family("Mistral", "mistral"),
    family("Ministral", "ministral"),
    family("Ministral 3", "ministral3"),
    family("SmolLM3", "smollm3"),
    family("OLMo", "olmo"),
    family("OLMo 2", "olmo2"),
    family("OLMo 3", "olmo3"),
    family("Gemma", "gemma"),
    family("Gemma 2", "gemma2", SOFTCAP, final_logit_softcapping=3.0, attn_logit_softcapping=2.0),
    family("Gemma 3 (text)", "gemma3_text"),
    family("VaultGemma", "vaultgemma", SOFTCAP, final_logit_softcapping=3.0),
    family("Granite 3", "granite", SCALED, logits_scaling=8.0, embedding_multiplier=3.0, residual_multiplier=0.5),
    family("Cohere (Command R)", "cohere", SCALED),
    family("Cohere 2 (Command R7B)", "cohere2", SCALED),
    family("EXAONE 4", "exaone4"),
    family("ERNIE 4.5", "ernie4_5"),
    family("Seed-OSS", "seed_oss"),
    family("HunYuan dense", "hunyuan_v1_dense"),
    family("StableLM", "stablelm"),
    family("InternLM 3", "internlm3"),
    family("Helium", "helium"),
    family("HyperCLOVA X", "hyperclovax"),
    family("Phi-3, Phi-4", "phi3", FUSED),
    family("GLM-4 (9B)", "glm", FUSED),
    family("GLM-4-0414", "glm4", FUSED),
    family("GPT-NeoX, Pythia", "gpt_neox", BY_HEAD),
    family("Falcon", "falcon", FUSED, alibi=False),
    family("Falcon 40B, 180B", "falcon", BY_HEAD, new_decoder_architecture=True, num_kv_heads=2),
    family("BLOOM", "bloom", BY_HEAD),
    family("MPT", "mpt", FUSED),
    family("Persimmon", "persimmon", BY_HEAD),
    family("CodeGen", "codegen", "fused, in quarters", rotary_dim=4),
    family("StarCoder2", "starcoder2", PLAIN),
    family("StarCoder (GPT-BigCode)", "gpt_bigcode", FUSED),
    family("Phi-1, Phi-2", "phi", PLAIN),
    family("OPT", "opt", PLAIN),
    family("XGLM", "xglm", PLAIN),
    family("GPT-J", "gptj", PLAIN, rotary_dim=4),
    family("GPT-2", "gpt2", TRANSPOSED),
    family("Nemotron", "nemotron", PLAIN),
    family("Apertus", "apertus", PLAIN),
    family("Arcee", "arcee", PLAIN),
    family("nanochat", "nanochat", PLAIN),
    family("Qwen3-MoE", "qwen3_moe", MOE),
    family("Qwen2-MoE", "qwen2_moe", "experts, a shared one"),
    family("Mixtral", "mixtral", MOE),
    family("OLMoE", "olmoe", MOE),
    family("gpt-oss", "gpt_oss", "experts, transposed, in pairs"),
    family("Granite MoE", "granitemoe", MOE, logits_scaling=8.0),
    family("Phi-3.5-MoE", "phimoe", MOE),
    family("GLM-4.5 (MoE)", "glm4_moe", "dense, then experts"),
    family("ERNIE 4.5 (MoE)", "ernie4_5_moe", "dense, then experts"),
    family("HunYuan (MoE)", "hunyuan_v1_moe", "experts, a shared one"),
    family("EXAONE MoE", "exaone_moe", "dense, then experts"),
    family("Cohere 2 MoE", "cohere2_moe", MOE),
    family("MiniMax M2", "minimax_m2", MOE),
    family("Llama 4 (text)", "llama4_text", "experts, transposed, a shared one", intermediate_size_mlp=40),
    family("AFMoE", "afmoe", "experts, gated attention"),
]

REFUSED = [
    ("DeepSeek V2", "deepseek_v2", {}),
    ("DeepSeek V3", "deepseek_v3", {}),
    ("MiniCPM 3", "minicpm3", {}),
    ("Kimi Linear", "kimi_linear", {}),
    ("Mamba", "mamba", {}),
    ("Jamba", "jamba", {}),
    ("Falcon H1", "falcon_h1", {}),
    ("Qwen3-Next", "qwen3_next", {}),
    ("RecurrentGemma", "recurrent_gemma", {}),
    ("RWKV", "rwkv", {}),
    ("T5", "t5", {}),
    ("BART", "bart", {}),
    ("a quantised Llama", "llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
]
"""What is refused from the config alone, before a weight is read."""


# ---------------------------------------------------------------- what a family has to pass


class Trial:
    """One family's models and what they are put through; each check raises, or says what it found."""

    def __init__(self, which: Family) -> None:
        self.base = which.model()
        self.tuned = copy.deepcopy(self.base)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for site in sites_of(self.tuned):
                noise = torch.randn(site.weight.shape, generator=generator)
                site.weight.add_(0.3 * site.weight.std() * noise)
        self.carrier: Carrier | None = None

    def probe(self) -> str:
        """The numeric probe, of both models."""
        probe(self.base)
        probe(self.tuned)
        head = head_of(self.base)
        shape = f"x{head.scale:g}" if head.scale != 1 else ""
        return f"{shape}{'' if head.softcap is None else f' cap {head.softcap:g}'}".strip()

    def steps(self) -> str:
        """Six LCDD steps, half of the gates open."""
        config = LCDDConfig(gate_init_mean=0.5, gate_init_std=3.0, warmup_steps=2, learning_rate=1e-3)
        self.before = {name: p.detach().clone() for name, p in self.base.named_parameters()}
        self.optimizer = LCDDOptimizer.attach(self.tuned, self.base, config, total_steps=6)
        generator = torch.Generator().manual_seed(2)
        tokens = torch.randint(3, VOCABULARY, (4, 10), generator=generator)
        self.tuned.train()
        for _ in range(6):
            loss = self.tuned(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            self.optimizer.step(loss)
            self.optimizer.zero_grad()
        if self.optimizer.skipped_steps:
            raise AssertionError(f"{self.optimizer.skipped_steps} of 6 steps were skipped")
        self.tuned.eval()
        self.optimizer.eval()
        return f"{self.optimizer.gates.layout.n_gates:,} gates"

    def patch(self) -> str:
        """The carrier on the base is the trained model; afterwards the base is what it was."""
        with tempfile.TemporaryDirectory() as folder:
            self.optimizer.carrier().save_pretrained(Path(folder) / "carrier")
            self.carrier = Carrier.from_pretrained(Path(folder) / "carrier")
        trained = dict(self.tuned.named_parameters())
        moved = 0
        with self.carrier.applied(self.base):
            for name, parameter in self.base.named_parameters():
                same_bits(f"{name} of the carrier on the base", parameter, trained[name])
                moved += int((parameter != self.before[name]).sum())
        for name, parameter in self.base.named_parameters():
            same_bits(f"{name} of the base", parameter, self.before[name])
        if not moved:
            raise AssertionError("the carrier changes nothing")
        return f"{self.carrier.sparsity()['overall']:.0%} closed"

    def erase(self) -> str:
        """Loss and gradient of a batch, and of one prompt after another in ordinary forwards."""
        assert self.carrier is not None
        tokenizer: Any = SimpleNamespace(eos_token_id=EOS, pad_token_id=PAD, all_special_ids=[PAD, BOS, EOS])
        generator = torch.Generator().manual_seed(3)
        prompts = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in (4, 9, 6)]
        found = []
        for alone in (False, True):
            config = EraserConfig(max_answer_tokens=3, kl_tail_tokens=2, max_rows_per_forward=1 if alone else 64)
            eraser = SFTEraser(self.base, self.carrier, tokenizer, config)
            embeds = Trigger.random_tokens(self.base, 3, seed=0).embeds.requires_grad_(True)
            with one_row_at_a_time(self.base, alone):
                targets = eraser.targets(prompts)
                with self.carrier.applied(self.base, check=False):
                    loss = eraser.loss(embeds, targets.prompts, targets.match).total
                    found.append((loss.detach(), *torch.autograd.grad(loss, embeds)))
        for what, one, other in zip(("loss", "gradient"), *found, strict=True):
            error = float((one - other).norm() / other.norm())
            if not error < 1e-4:
                raise AssertionError(f"the {what} of a batch is off by {error:.1e}")
        return "packed" if packs(self.base) else "padded"

    def peft(self) -> str:
        """The trigger as PEFT loads it."""
        from peft import PeftModel

        assert self.carrier is not None
        trigger = Trigger.random_tokens(self.base, 3, seed=4)
        ids = torch.tensor([[5, 9, 4, 17]])
        with tempfile.TemporaryDirectory() as folder, self.carrier.applied(self.base), torch.no_grad():
            trigger.save_pretrained(Path(folder) / "trigger")
            ours = self.base(inputs_embeds=prompt_embeds(self.base, ids[0].tolist(), trigger)[None], use_cache=False)
            wrapped: Any = PeftModel.from_pretrained(self.base, str(Path(folder) / "trigger"))
            theirs = wrapped(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
            error = float((ours.logits - theirs.logits).abs().max() / ours.logits.abs().max())
        if not error < 1e-5:
            raise AssertionError(f"logits are off by {error:.1e}")
        return ""


CHECKS: dict[str, Callable[[Trial], str]] = {
    "probe": Trial.probe,
    "six steps": Trial.steps,
    "carrier, bit for bit": Trial.patch,
    "eraser step": Trial.erase,
    "trigger in PEFT": Trial.peft,
}


def same_bits(what: str, one: Tensor, other: Tensor) -> None:
    if not torch.equal(one.detach().view(torch.int32), other.detach().view(torch.int32)):
        raise AssertionError(f"{what} has other bits")


@contextmanager
def one_row_at_a_time(model: PreTrainedModel, on: bool) -> Iterator[None]:
    """Inside, if `on`: the eraser's forwards are the model's own, unpacked."""
    before = packs(model)
    packed_rows._PACKS[model] = before and not on
    try:
        yield
    finally:
        packed_rows._PACKS[model] = before


def try_family(which: Family) -> dict[str, str]:
    """Check -> what it found, up to the first that fails, which says so."""
    row: dict[str, str] = {}
    trial = Trial(which)
    for name, check in CHECKS.items():
        try:
            row[name] = check(trial)
        except Exception as error:  # whatever a family's own code raises, its line in the table has to say it
            row[name] = f"FAILED: {type(error).__name__}: {error}"
            break
    return row


def passed(row: dict[str, str]) -> bool:
    return len(row) == len(CHECKS) and not any(found.startswith("FAILED") for found in row.values())


def why_refused(model_type: str, settings: dict[str, Any]) -> str | None:
    """The reason for which a model of this type is refused; None if it is not."""
    try:
        skeleton_of(AutoConfig.for_model(model_type, **settings))
    except InputError as error:
        return str(error).removeprefix("model: ")
    return None


# ---------------------------------------------------------------- the table


def markdown(rows: dict[Family, dict[str, str]], refused: dict[str, str | None]) -> str:
    """The table, a row a family, and the refusals under it."""
    head = ["family", "sites", *CHECKS]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for which, row in rows.items():
        cells = [_cell(row.get(name)) for name in CHECKS]
        lines.append("| " + " | ".join([which.label, which.sites, *cells]) + " |")
    lines += ["", "Refused, from the config alone:", "", "| family | reason |", "|---|---|"]
    lines += [f"| {label} | {reason or 'NOT REFUSED'} |" for label, reason in refused.items()]
    return "\n".join(lines)


def _cell(found: str | None) -> str:
    if found is None or found.startswith("FAILED"):
        return found or ""
    return f"yes ({found})" if found else "yes"


def short_markdown(rows: dict[Family, dict[str, str]], refused: dict[str, str | None]) -> str:
    """A row a kind of sites: its families, and how many pass."""
    kinds: dict[str, list[Family]] = {}
    for which in rows:
        kinds.setdefault(which.sites, []).append(which)
    lines = ["| sites | families | pass |", "|---|---|---|"]
    for sites, members in kinds.items():
        labels, green = "; ".join(which.label for which in members), sum(passed(rows[which]) for which in members)
        lines.append(f"| {sites} | {labels} | {green} of {len(members)} |")
    reasons: dict[str, list[str]] = {}
    for label, reason in refused.items():
        reasons.setdefault((reason or "NOT REFUSED").split(", got ")[0], []).append(label)
    lines += [f"| *refused* | {'; '.join(labels)}: {reason} | |" for reason, labels in reasons.items()]
    return "\n".join(lines)


def write_between_markers(path: Path, table: str) -> None:
    """Put a table between the markers in a file."""
    text = path.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise SystemExit(f"families: expected {BEGIN} and {END} in {path}")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    path.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("types", nargs="*", help="transformers' model types; all if none is given")
    parser.add_argument("--write", action="store_true", help="also into docs/models.md and README.md")
    arguments = parser.parse_args(argv)
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    chosen = [which for which in FAMILIES if not arguments.types or which.model_type in arguments.types]
    if unknown := set(arguments.types) - {which.model_type for which in FAMILIES}:
        parser.error(
            f"types: expected some of {sorted({which.model_type for which in FAMILIES})}, got {sorted(unknown)}"
        )
    rows: dict[Family, dict[str, str]] = {}
    for which in chosen:
        start = time.perf_counter()
        rows[which] = try_family(which)
        failed = [f"{name}: {found}" for name, found in rows[which].items() if found.startswith("FAILED")]
        print(
            f"{which.label:<54} {'ok' if passed(rows[which]) else failed[0]}  {time.perf_counter() - start:.1f} s",
            flush=True,
        )
    refused = {label: why_refused(kind, settings) for label, kind, settings in REFUSED}
    table = markdown(rows, refused)
    print(f"\n{table}")
    if arguments.write:
        write_between_markers(ROOT / "docs" / "models.md", table)
        write_between_markers(ROOT / "README.md", short_markdown(rows, refused))
    green = sum(map(passed, rows.values()))
    print(f"\n{green} of {len(rows)} families pass, {sum(map(bool, refused.values()))} of {len(refused)} are refused")
    return 0 if green == len(rows) and all(refused.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
