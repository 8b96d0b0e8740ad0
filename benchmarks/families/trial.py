"""What a family has to pass, and what is refused."""

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from benchmarks.families.known import BOS, EOS, PAD, VOCABULARY, Family
from benchmarks.families.record import FAILED
from lcdd.carrier import Carrier
from lcdd.config import EraserConfig, LCDDConfig
from lcdd.eraser import SFTEraser, Trigger, prompt_embeds
from lcdd.errors import InputError
from lcdd.models import head_of, packed_rows, packs, probe, sites_of, skeleton_of
from lcdd.optimizer import LCDDOptimizer


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
            row[name] = f"{FAILED}: {type(error).__name__}: {error}"
            break
    return row


def failure(row: dict[str, str]) -> str | None:
    """The check that failed and how; None where all passed."""
    return next((f"{name}: {found}" for name, found in row.items() if found.startswith(FAILED)), None)


def passed(row: dict[str, str]) -> bool:
    return len(row) == len(CHECKS) and failure(row) is None


def why_refused(model_type: str, settings: dict[str, Any]) -> str | None:
    """The reason for which a model of this type is refused; None if it is not."""
    try:
        skeleton_of(AutoConfig.for_model(model_type, **settings))
    except InputError as error:
        return str(error).removeprefix("model: ")
    return None
