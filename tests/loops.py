"""A model that really packs, for the tests of other people's loops: one Llama layer, most gates closed.

Small matrices stay dense whatever is open, so these are large enough: width 384.
"""

import copy
from typing import Any

import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from lcdd.config import LCDDConfig
from lcdd.models import layout_of, sites_of
from lcdd.optimizer import LCDDOptimizer

LAYOUTS = {"dense": "hard_concrete", "block": "hard_concrete", "panels": "heaviside_ste"}
"""Layout of the weight gradients -> the gates that give it."""
TOKENS = torch.randint(3, 60, (8, 10), generator=torch.Generator().manual_seed(9))


def packable() -> tuple[Any, Any]:
    """A base and its fine-tuned twin, in float32."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "intermediate_size": 448, "num_attention_heads": 8, "num_key_value_heads": 2}
    base = LlamaForCausalLM(
        LlamaConfig(vocab_size=60, num_hidden_layers=1, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes)
    )
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for site in sites_of(tuned):
            site.weight.add_(0.02 * torch.randn_like(site.weight))
    return base, tuned


def attach(base: Any, tuned: Any, layout: str, *, pack: str = "auto", total_steps: int = 20, **changes: Any) -> Any:
    """An optimizer whose gradients have this layout: a tenth of the gates is open, of "dense" all but a few."""
    n = layout_of(tuned).n_gates
    wide = torch.rand(n, generator=torch.Generator().manual_seed(3)) < (0.97 if layout == "dense" else 0.1)
    # SGD on θ and a large epsilon: Adam would blow the rounding of gradients near zero up to whole steps
    quiet = {"gate_optimizer": "sgd", "gate_lr": 1.0, "adam_epsilon": 1e-4}
    settings = {"learning_rate": 1e-3, "warmup_steps": 3, **quiet, **changes}
    config = LCDDConfig(gate_kind=LAYOUTS[layout], pack=pack, **settings)
    start = torch.where(wide, 3.0, -6.0)
    return LCDDOptimizer.attach(tuned, base, config, total_steps=total_steps, initial_logits=start)


def loss_of(model: Any, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    logits = model(input_ids=tokens).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def layouts_of(model: Any) -> set[str]:
    """The layouts of the gradients that the next backward makes; k and v are too small to pack."""
    return {site.linear.layout for site in sites_of(model) if site.kind not in "kv"}


def assert_same_run(ours: LCDDOptimizer, theirs: LCDDOptimizer, *, tolerance: float) -> None:
    """Same counts, losses, θ, λ and Δ, to rounding."""
    for name in ("completed_steps", "skipped_steps"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert abs(ours.last_loss - theirs.last_loss) <= tolerance * abs(theirs.last_loss)
    assert abs(ours.grad_norm - theirs.grad_norm) <= tolerance * theirs.grad_norm
    assert abs(ours.dual.dual_lambda - theirs.dual.dual_lambda) <= tolerance * theirs.dual.dual_lambda
    torch.testing.assert_close(ours.gates.logits, theirs.gates.logits, rtol=tolerance, atol=tolerance)
    for (name, (_, delta, _)), (_, other, _) in zip(ours.masked().items(), theirs.masked().values(), strict=True):
        torch.testing.assert_close(delta, other, rtol=0, atol=tolerance, msg=name)
