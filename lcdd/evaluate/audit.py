"""The audit of a carrier and its trigger: is it the cause, would anything else have done, what is merely said.

    necessity     the carrier without each group and each layer; SFT without its change on the carrier's channels
    sufficiency   SFT's change on the carrier's channels alone; on random channels of the same number; a random mask of
                  the same size with equal training
    triggers      random tokens; the trigger before base and plain SFT; learned on plain SFT, on random channels, by KL
                  only, by matching only
    masks         found afterwards, with frozen weights, by cross-entropy and by KL to the SFT model
    dense         SFT continued for as long as LCDD trained

Zeroing the whole carrier gives the base back by construction and so proves nothing: it is not among the rows.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from lcdd.carrier import (
    Carrier,
    dense_patch,
    only_channels,
    random_channels,
    without_channels,
    without_group,
    without_layer,
)
from lcdd.checkpoint import RunLog
from lcdd.config import AuditConfig, EraserConfig, LCDDConfig, SFTConfig, TrainConfig
from lcdd.data import Encoded
from lcdd.eraser import Prompt, SFTEraser, Trigger
from lcdd.evaluate.claims import comparisons, judge
from lcdd.evaluate.evaluate import evaluate
from lcdd.evaluate.states import ModelState, PatchSource, random_prefixes
from lcdd.models import GROUPS, PreTrainedModel, PreTrainedTokenizerBase, rows_never_drawn
from lcdd.optimizer import LCDDOptimizer, SFTOptimizer
from lcdd.trainer import HeldOut, StartLosses, compress, fit, total_steps

FIXED_LOGIT = 20.0
"""Gate logit of the random mask's open gates, and minus that of its closed ones: far from moving."""

VARIANTS: dict[str, dict[str, Any]] = {
    "random_channels": {"channel_kind": "random"},
    "kl_only": {"channel_kind": "none"},
    "matching_only": {"kl_weight": 0.0, "answer_kl_weight": 0.0},
}
"""Changed settings of the trigger's ablations on the carrier."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """What an audit works on: the models, the data and the settings of the run that made carrier and trigger.

    Attributes:
        base: unpatched; unchanged afterwards.
        load_sft: a fresh copy of the SFT model, for training and for its patch.
        train, validation: encoded completions, as LCDD had them.
        trigger_train, trigger_validation, held_out: prompts.
        matches: answer text -> whether it shows the behaviour.
        lcdd, eraser: settings of that run; every control trains with them.
        patches: further dense patches, "matched_norm" say.
        triggers: what has been learned already, state name -> trigger; what an audit needs and is missing is learned.
    """

    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    load_sft: Callable[[], PreTrainedModel]
    carrier: Carrier
    train: Sequence[Encoded]
    validation: Sequence[Encoded]
    trigger_train: Sequence[Prompt]
    trigger_validation: Sequence[Prompt]
    held_out: Sequence[Prompt]
    matches: Callable[[str], bool]
    lcdd: LCDDConfig
    eraser: EraserConfig
    patches: Mapping[str, PatchSource] = field(default_factory=dict)
    triggers: Mapping[str, Trigger] = field(default_factory=dict)


def audit(
    study: Study,
    config: AuditConfig,
    *,
    say: Callable[[str], None] = print,
    log: Callable[[str], RunLog] | None = None,
) -> dict[str, Any]:
    """Train what is missing, answer the held-out prompts in every state, judge the claims.

    On several ranks it is called on each alike: they train together and share out the prompts.

    Args:
        log: stage name -> its log; nothing is logged if None.

    Returns:
        `states` (rows of the reversal table, each with the part it belongs to), `differences`, `patches` (sparsity and
        norm of every patch), `claims`, `parts`, `n_prompts`, `samples`.
    """
    runner = _Runner(study, config, say, log or (lambda stage: RunLog(None, stage=stage)))
    parts = dict.fromkeys(["table", *config.parts])
    states = {"base": ("table", ModelState())}
    for part in parts:
        for name, state in runner.states(part).items():
            states.setdefault(name, (part, state))
    chosen = {name: state for name, (_, state) in states.items()}
    say(f"Audit: answering {len(study.held_out)} prompts in {len(chosen)} states")
    found = evaluate(
        study.base,
        study.tokenizer,
        study.held_out,
        chosen,
        matches=study.matches,
        comparisons=comparisons(list(chosen)),
        max_new_tokens=config.max_new_tokens,
        batch_size=config.per_device_eval_batch_size,
        kl_prompts=0,
        n_samples=4,
        over_ranks=True,
    )
    result = {
        "parts": list(parts),
        "n_prompts": len(study.held_out),
        "states": {name: {"part": states[name][0], **row} for name, row in found["models"].items()},
        "differences": found["differences"],
        "patches": runner.described,
        "samples": found["samples"],
    }
    return {**result, "claims": judge(result)}


class _Runner:
    """Makes the states of each part; keeps what it has learned."""

    def __init__(
        self, study: Study, config: AuditConfig, say: Callable[[str], None], log: Callable[[str], RunLog]
    ) -> None:
        self.study, self.config, self._say, self._log = study, config, say, log
        self.triggers = dict(study.triggers)
        self.described: dict[str, dict[str, Any]] = {}
        self._describe("carrier", study.carrier)

    # ------------------------------------------------------------------ parts

    def states(self, part: str) -> dict[str, ModelState]:
        """The states of one part, after whatever they need was trained."""
        return {
            "table": self._table,
            "necessity": self._necessity,
            "sufficiency": self._sufficiency,
            "triggers": self._triggers,
            "masks": self._masks,
            "dense": self._dense,
        }[part]()

    def _table(self) -> dict[str, ModelState]:
        """Carrier, SFT and further dense patches, and the carrier's own trigger."""
        states = {"sft": ModelState(patch=self._sft), "carrier": ModelState(patch=self.study.carrier)}
        states |= {name: ModelState(patch=patch) for name, patch in self.study.patches.items()}
        return states | self._behind_trigger("carrier", self.study.carrier)

    def _necessity(self) -> dict[str, ModelState]:
        carrier = self.study.carrier
        states = {f"carrier-without:group {group}": without_group(carrier, group) for group in GROUPS}
        for layer in range(carrier.layout.n_layers):
            states[f"carrier-without:layer {layer}"] = without_layer(carrier, layer)
        found = {name: ModelState(patch=patch) for name, patch in states.items()}
        found["sft-without:carrier"] = ModelState(patch=lambda: without_channels(self._sft(), carrier.gate != 0))
        found["sft-without:random"] = ModelState(patches=self._random(without_channels))
        return found

    def _sufficiency(self) -> dict[str, ModelState]:
        carrier = self.study.carrier
        patch = self._random_mask()
        return {
            "sft-only:carrier": ModelState(patch=lambda: only_channels(self._sft(), carrier.gate != 0)),
            "sft-only:random": ModelState(patches=self._random(only_channels)),
            "random_mask": ModelState(patch=patch),
            **self._behind_trigger("random_mask", patch),
        }

    def _triggers(self) -> dict[str, ModelState]:
        carrier, base = self.study.carrier, self.study.base
        learned = self._trigger("carrier+trigger", carrier, {})
        junk = random_prefixes(
            base,
            learned,
            seed=self.config.seed,
            draws=self.config.random_draws,
            special=rows_never_drawn(self.study.tokenizer, self.study.base),
        )
        states = {
            "carrier+random_prefix": ModelState(patch=carrier, triggers=junk),
            "base+random_prefix": ModelState(triggers=junk),
            "base+trigger": ModelState(triggers=(learned,)),
            "sft+carrier_trigger": ModelState(patch=self._sft, triggers=(learned,)),
            **self._behind_trigger("sft", self._sft),
        }
        for name, patch in self.study.patches.items():
            states |= self._behind_trigger(name, patch)
        for variant, changes in VARIANTS.items():
            name = f"carrier+trigger_{variant}"
            states[name] = ModelState(patch=carrier, triggers=(self._trigger(name, carrier, changes),))
        return states

    def _masks(self) -> dict[str, ModelState]:
        states = {}
        for name, loss in (("posthoc_ce", "cross_entropy"), ("posthoc_kl", "kl")):
            patch = self._lcdd(name, replace(self.study.lcdd, train_delta=False, loss=loss, gating="optimizer"))
            states[name] = ModelState(patch=patch)
            states |= self._behind_trigger(name, patch)
        return states

    def _dense(self) -> dict[str, ModelState]:
        patch = self._continued()
        return {"continued_sft": ModelState(patch=patch), **self._behind_trigger("continued_sft", patch)}

    # ------------------------------------------------------------------ patches

    def _sft(self) -> Carrier:
        patch = dense_patch(self.study.base, self.study.load_sft())
        self._describe("sft", patch)
        return patch

    def _random(self, take: Callable[..., Carrier]) -> tuple[PatchSource, ...]:
        """SFT's change on (or without) as many random channels as the carrier has, several draws."""

        def source(seed: int) -> PatchSource:
            return lambda: take(self._sft(), random_channels(self.study.carrier, seed=seed))

        return tuple(source(self.config.seed + draw) for draw in range(self.config.random_draws))

    def _random_mask(self) -> Carrier:
        """LCDD's training of the weights from SFT, on random gates of the carrier's number that stay as they are."""
        channels = random_channels(self.study.carrier, seed=self.config.seed)
        settings = self.study.lcdd.under("dual", gate_kind="heaviside_ste", gate_lr=0.0, gating="optimizer")
        return self._lcdd("random_mask", settings, initial_logits=(channels.float() * 2 - 1) * FIXED_LOGIT)

    def _lcdd(self, name: str, settings: LCDDConfig, **more: Any) -> Carrier:
        study = self.study
        # a control that prunes badly, or cannot prune at all, is a result, and must not end the audit
        settings = replace(
            settings, save_steps=0, resume=False, early_stop_patience=0, base_kl_weight=0.0, separate_from=()
        )
        held_out = self._held_out(settings)
        with self._work(name) as log:
            model, teacher = study.load_sft(), study.load_sft() if settings.distills else None
            start = StartLosses(base=held_out.loss(study.base), model=held_out.loss(model))
            steps = total_steps(settings, len(study.train))
            optimizer = LCDDOptimizer.attach(model, study.base, settings, total_steps=steps, **more)
            compress(optimizer, study.train, held_out, start=start, log=log, teacher=teacher, progress=False)
            patch = optimizer.carrier()
            optimizer.detach()
        self._describe(name, patch)
        return patch

    def _continued(self) -> Carrier:
        """SFT trained on with the batches, the learning rate and the number of steps that LCDD had, without gates."""
        study, lcdd = self.study, self.study.lcdd
        shared = {name: getattr(lcdd, name) for name in SFTConfig.__dataclass_fields__ if hasattr(lcdd, name)}
        shared |= {"warmup_steps": lcdd.lr_warmup_steps, "save_steps": 0}
        settings = SFTConfig(**shared | {"max_steps": total_steps(lcdd, len(study.train))})
        with self._work("continued_sft") as log:
            model = study.load_sft()
            fit(SFTOptimizer(model, settings), study.train, self._held_out(settings), log=log, progress=False)
            patch = dense_patch(study.base, model)
        self._describe("continued_sft", patch)
        return patch

    def _held_out(self, settings: TrainConfig) -> HeldOut:
        study = self.study
        return HeldOut.of(study.train, study.validation, settings, pad_token_id=study.tokenizer.pad_token_id)

    # ------------------------------------------------------------------ triggers

    def _behind_trigger(self, name: str, patch: PatchSource) -> dict[str, ModelState]:
        state = f"{name}+trigger"
        return {state: ModelState(patch=patch, triggers=(self._trigger(state, patch, {}),))}

    def _trigger(self, state: str, source: PatchSource, changes: Mapping[str, Any]) -> Trigger:
        """The trigger of a state, learned with the run's own settings unless it is there already."""
        if state not in self.triggers:
            study = self.study
            with self._work(state) as log:
                settings = replace(study.eraser, **changes, save_steps=0, resume=False)
                patch = source if isinstance(source, Carrier) else source()
                # a sparse patch has channels of its own; a dense one is matched on the carrier's
                owner = patch if 0 < patch.n_open < patch.layout.n_gates else study.carrier
                channels = owner.channels(settings.channel_kind, seed=self.config.seed)
                eraser = SFTEraser(study.base, patch, study.tokenizer, settings, channels)
                self.triggers[state] = eraser.fit(study.trigger_train, study.trigger_validation, log=log)
        return self.triggers[state]

    # ------------------------------------------------------------------ housekeeping

    @contextmanager
    def _work(self, name: str) -> Iterator[RunLog]:
        self._say(f"Audit: {name}")
        with self._log(f"audit_{name}") as log:
            yield log
        gc.collect()

    def _describe(self, name: str, patch: Carrier) -> None:
        if name not in self.described:
            self.described[name] = {
                "sparsity": patch.sparsity()["overall"],
                "n_open": patch.n_open,
                "delta_norm": patch.delta_norm(),
            }
