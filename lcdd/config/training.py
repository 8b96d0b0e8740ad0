"""Settings of every stage: frozen, keyword-only dataclasses that check themselves.

Each field carries its help text, and where it has one its range or its choices, as metadata; `lcdd.settings`
generates the command line and the YAML reader from them. TRL's and transformers' argument names are used
where they exist. A wrong value is an `InputError` that names the field, what was expected and what came.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

from lcdd.config.fields import option
from lcdd.config.shared import MAX_SEED, OfBase, OfSFT, OnDevice, Resumable, Spread, Tracked, Writes
from lcdd.errors import InputError

GATE_KINDS = ("hard_concrete", "heaviside_ste")
DTYPES = ("float64", "float32", "bfloat16", "float16")
LOSSES = ("cross_entropy", "kl")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Writes, Tracked, Resumable, Spread, OnDevice):
    """What SFT and LCDD training share: batches, schedule, precision, log."""

    num_train_epochs: float = option(3.0, "passes over the training split", above=0.0, at_most=1e6, common=True)
    max_steps: int = option(-1, "optimizer steps; overrides num_train_epochs when positive", at_least=-1, common=True)
    per_device_train_batch_size: int = option(8, "examples in a micro-batch", at_least=1, common=True)
    per_device_eval_batch_size: int = option(
        16, "examples in a batch of the validation loss", at_least=1, resumable=True
    )
    eval_steps: int | None = option(
        None,
        "measure the held-out loss and show answers every N optimizer steps; null: ten times in a run, at least ten "
        "steps apart; 0: only before and after",
        at_least=0,
        resumable=True,
    )
    max_eval_samples: int = option(
        64, "validation examples that held-out losses are measured on, at most; 0: all", at_least=0, resumable=True
    )
    gradient_accumulation_steps: int = option(
        1, "micro-batches in an optimizer step", at_least=1, common=True, resumable=True, settled=True
    )
    max_length: int = option(
        512, "tokens of prompt and completion together; longer completions are cut", at_least=2, common=True
    )
    completion_only: bool = option(True, "loss on the completion's tokens only; off: on the whole text")
    learning_rate: float = option(2e-5, "peak learning rate of the weights", at_least=0.0, at_most=1e6, common=True)
    lr_scheduler_type: str = option(
        "cosine", "schedule of the weights' learning rate", choices=("cosine", "linear", "constant")
    )
    adam_beta1: float = option(0.9, "AdamW's first-moment decay", at_least=0.0, below=1.0)
    adam_beta2: float = option(0.999, "AdamW's second-moment decay", at_least=0.0, below=1.0)
    adam_epsilon: float = option(1e-8, "AdamW's epsilon", above=0.0)
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay", at_least=0.0)
    max_grad_norm: float = option(1.0, "clip the gradient's norm to this; 0: off", at_least=0.0)
    train_unmasked: bool = option(
        False,
        "also train biases and norm weights, which no gate can close; the base is then not recovered exactly",
    )
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    bf16: bool = option(
        False, "SFT: bfloat16 autocast over float32 weights; LCDD: bfloat16 weights; off: the checkpoint's dtype"
    )
    logging_steps: int = option(1, "a line in log.jsonl every N optimizer steps", at_least=1, resumable=True)
    max_nonfinite_steps: int = option(
        5, "stop after this many steps in a row whose loss is NaN or infinite", at_least=1, resumable=True
    )
    seed: int = option(0, "seed of the batches' order, and of the gates' noise", at_least=0, at_most=MAX_SEED)

    @property
    def lr_warmup(self) -> int:
        """Steps over which the weights' learning rate rises to its peak; every stage has them under its own name."""
        return 0

    @property
    def distills(self) -> bool:
        """Whether the loss is held against another model's distribution instead of the examples' tokens."""
        return False

    def check(self) -> None:
        super().check()
        if self.max_steps == 0:
            raise InputError(f"{type(self).__name__}.max_steps: expected -1 or a positive number of steps, got 0")


@dataclass(frozen=True, kw_only=True)
class SFTConfig(TrainConfig, OfBase):
    """Supervised fine-tuning of the transformer layers, whole or by LoRA (embeddings and head stay at base values)."""

    warmup_steps: int = option(0, "steps over which the learning rate rises to its peak", at_least=0)
    max_delta_norm: float | None = option(
        None,
        "keep the L2 norm of all weight changes together within this (projection after each step): "
        "the matched-norm control",
        above=0.0,
    )
    use_peft: bool = option(
        False,
        "train LoRA on the masked layers and save the merged model (needs `pip install lcdd[peft]`); its learning rate "
        "is about ten times that of whole weights",
    )
    lora_r: int = option(16, "LoRA: rank", at_least=1)
    lora_alpha: float = option(32, "LoRA: the product is scaled by this / lora_r", above=0.0)
    lora_dropout: float = option(0.05, "LoRA: share of inputs that are dropped in training", at_least=0.0, below=1.0)
    lora_target_modules: tuple[str, ...] = option(
        (), "LoRA: names of masked layers, or their ends (q_proj v_proj); none: every masked linear layer"
    )
    min_behavior_rate: float = option(
        0.5,
        "`lcdd run` ends after SFT where the share of validation answers that show the behaviour is clearly below this "
        "(all of its 95% interval), or the held-out loss did not fall; 0: never",
        at_least=0.0,
        at_most=1.0,
        resumable=True,
    )

    def check(self) -> None:
        super().check()
        changed = [f.name for f in fields(self) if f.name.startswith("lora_") and getattr(self, f.name) != f.default]
        if changed and not self.use_peft:
            raise InputError(
                f"SFTConfig.{changed[0]}: expected use_peft beside it, without which no LoRA is trained, got "
                f"{getattr(self, changed[0])!r}"
            )
        if self.use_peft and self.train_unmasked:
            raise InputError("SFTConfig.train_unmasked: expected it off with use_peft, which trains LoRA alone, got on")

    @property
    def lr_warmup(self) -> int:
        return self.warmup_steps


@dataclass(frozen=True, kw_only=True)
class LCDDConfig(TrainConfig, OfSFT):
    """LCDD: gates and delta under a loss constraint (method of arXiv 2605.06632, sections 1 to 3)."""

    learning_rate: float = option(
        5e-4,
        "peak learning rate of delta; under paced closing a twentieth of it while all gates are open",
        at_least=0.0,
        at_most=1e6,
        common=True,
    )
    lr_scheduler_type: str = option(
        "constant", "schedule of delta's learning rate", choices=("cosine", "linear", "constant")
    )
    gate_controller: str = option(
        "auto",
        "what closes gates: pacing by the loss, or the paper's dual descent on gate logits; auto: dual where "
        "reference_compat, gating forward, initial_carrier or a setting of the dual descent is given, else paced",
        choices=("auto", "paced", "dual"),
    )
    target_sparsity: float | None = option(
        None,
        "share of closed gates at which paced closing stops; null: the budget alone stops it",
        at_least=0.0,
        at_most=1.0,
        common=True,
        controller="paced",
    )
    shrink_delta: bool = option(
        True, "spend what is left of the budget, once no gate closes any more, on a smaller delta", controller="paced"
    )
    separate_from: tuple[str, ...] = option(
        (),
        "carriers of the same base, directories or hub names, that this one's is to keep clear of: what they have open "
        "is priced higher, so that the two can be composed and switched apart",
        controller="paced",
    )
    base_kl_weight: float = option(
        0.0,
        "also hold the carrier to the base's own answers, by this much of KL(base || carrier) beside the loss: a "
        "trigger then has less to undo",
        at_least=0.0,
        controller="paced",
    )
    base_kl_prompts: int = option(256, "training prompts whose base answers are held on to", at_least=1)
    base_kl_tokens: int = option(8, "tokens of each of the base's answers", at_least=2)
    base_kl_batch_size: int = option(8, "of them in a step", at_least=1)
    eval_steps: int | None = option(
        10,
        "steps between held-out losses of the gates that would ship; the best carrier within epsilon is kept; null: "
        "ten times in a run; 0: only before and after",
        at_least=0,
        resumable=True,
    )
    gate_kind: str = option(
        "hard_concrete",
        "stochastic gates, or the authors' step with a straight-through gradient",
        choices=GATE_KINDS,
    )
    gate_optimizer: str = option("adam", "optimizer of the gate logits", choices=("adam", "sgd"), controller="dual")
    gate_lr: float = option(
        0.1, "learning rate of the gate logits (never scheduled)", at_least=0.0, at_most=1e6, controller="dual"
    )
    gate_momentum: float = option(
        0.0, "momentum of the gate logits under sgd", at_least=0.0, below=1.0, controller="dual"
    )
    gate_init_mean: float = option(2.5, "mean of the initial gate logits", controller="dual")
    gate_init_std: float = option(0.1, "standard deviation of the initial gate logits", at_least=0.0, controller="dual")
    dual_lambda_init: float = option(
        1e-3, "initial weight of the expected number of open gates", above=0.0, controller="dual"
    )
    dual_lr: float = option(
        0.05, "rate at which lambda grows while the loss is below epsilon", at_least=0.0, controller="dual"
    )
    dual_lr_shrink: float | None = option(
        None,
        "rate at which lambda shrinks above epsilon; null: dual_lr",
        at_least=0.0,
        controller="dual",
    )
    dual_lambda_min: float = option(1e-8, "floor of lambda", above=0.0, controller="dual")
    dual_lambda_max: float = option(1e4, "cap of lambda", above=0.0, controller="dual")
    violation_clip: float = option(
        1.0,
        "the relative violation (ema - epsilon) / epsilon is clipped to +- this",
        above=0.0,
        controller="dual",
    )
    loss_ema_beta: float = option(
        0.95,
        "decay of the bias-corrected moving average of the loss",
        at_least=0.0,
        below=1.0,
        controller="dual",
    )
    warmup_steps: int = option(
        50,
        "steps before any gate is priced, which measure the baseline (dual: over which the penalty rises); paced: at "
        "most a twentieth of the run",
        at_least=1,
    )
    lr_warmup_steps: int = option(0, "steps over which the weights' learning rate rises to its peak", at_least=0)
    loss_budget: float = option(
        0.2, "epsilon is the baseline and this share of it (paced: or of what SFT gained over the base, if that is "
        "less)", at_least=0.0, common=True,
    )  # fmt: skip
    loss_floor: float = option(0.02, "epsilon is at least baseline + this many nats", at_least=0.0)
    freeze_fraction: float = option(
        0.2,
        "last share of the steps in which the gates are fixed and only delta trains",
        at_least=0.0,
        below=1.0,
    )
    train_delta: bool = option(True, "off: mask-only, the weights' delta stays at the SFT model's")
    delta_dtype: str | None = option(None, "dtype that delta is kept in; null: the weight's", choices=DTYPES)
    moment_dtype: str | None = option(
        None, "dtype of AdamW's moments; null: float32 (float64 for float64 weights)", choices=DTYPES
    )
    gating: str = option(
        "optimizer",
        "where gates meet the weights: in the optimizer step, or inside every forward (a second route to the same "
        "gradients, slower)",
        choices=("optimizer", "forward"),
    )
    pack: str = option(
        "auto",
        "weight gradients on the open block alone where that pays, or never",
        choices=("auto", "never"),
    )
    loss: str = option(
        "cross_entropy", "the constrained loss; kl: KL to the SFT model, for mask-only runs", choices=LOSSES
    )
    initial_carrier: str | None = option(
        None,
        "carrier directory of an earlier run, whose gate logits this one starts from",
        resumable=True,
        settled=True,
    )
    early_stop_patience: int = option(
        200,
        "stop with advice after this many steps in a row with the loss far over its budget, or with lambda at its cap "
        "and no more gates closing; 0: never",
        at_least=0,
        resumable=True,
    )
    save_folded: bool = option(
        False, "also save the carrier folded into an ordinary checkpoint", common=True, resumable=True, settled=True
    )
    reference_compat: bool = option(
        False,
        "the authors' arithmetic where ours is better: the gate penalty once a micro-batch (of "
        "gradient_accumulation_steps), and delta rounded so that base + delta is a weight of the model's dtype",
    )

    @property
    def paced(self) -> bool:
        """Whether closing is paced by the loss; else the paper's dual descent moves the gate logits."""
        if self.gate_controller != "auto":
            return self.gate_controller == "paced"
        if self.settings_of("paced"):
            return True
        theirs = self.reference_compat or self.gating == "forward" or self.initial_carrier is not None
        return not (theirs or self.settings_of("dual"))

    def settings_of(self, controller: str) -> list[str]:
        """Settings that only this controller has, and that differ from their defaults."""
        return [
            item.name
            for item in fields(self)
            if item.metadata["controller"] == controller and getattr(self, item.name) != item.default
        ]

    def under(self, controller: str, **changes: Any) -> "LCDDConfig":
        """The same with `changes` under that controller, the other one's settings at their defaults."""
        other = {"paced": "dual", "dual": "paced"}[controller]
        plain = {item.name: item.default for item in fields(self) if item.name in self.settings_of(other)}
        return replace(self, **{**plain, "gate_controller": controller, **changes})

    def _check_controller(self) -> None:
        if not self.paced:
            if given := self.settings_of("paced"):
                raise InputError(
                    f"LCDDConfig.{given[0]}: expected its default under the dual descent, which does not have it, "
                    f"got {getattr(self, given[0])!r}"
                )
            return
        if given := self.settings_of("dual"):
            raise InputError(
                f"LCDDConfig.{given[0]}: expected its default under gate_controller 'paced', which does not have it, "
                f"got {getattr(self, given[0])!r}"
            )
        if self.gating == "forward" or self.reference_compat:
            raise InputError(
                "LCDDConfig.gate_controller: expected dual with gating 'forward' or reference_compat, got 'paced'"
            )

    def check(self) -> None:
        super().check()
        self._check_controller()
        if self.dual_lambda_min > self.dual_lambda_max:
            raise InputError(
                f"LCDDConfig.dual_lambda_min: expected at most dual_lambda_max = {self.dual_lambda_max:g}, "
                f"got {self.dual_lambda_min:g}"
            )
        if not self.dual_lambda_min <= self.dual_lambda_init <= self.dual_lambda_max:
            raise InputError(
                f"LCDDConfig.dual_lambda_init: expected a value between dual_lambda_min = "
                f"{self.dual_lambda_min:g} "
                f"and dual_lambda_max = {self.dual_lambda_max:g}, got {self.dual_lambda_init:g}"
            )
        if self.loss == "kl" and self.train_delta:
            raise InputError("LCDDConfig.loss: expected cross_entropy unless train_delta is off, got 'kl'")
        if self.reference_compat and self.gating == "forward":
            raise InputError("LCDDConfig.reference_compat: expected gating 'optimizer' beside it, got 'forward'")
        if self.reference_compat and self.delta_dtype in ("bfloat16", "float16"):
            raise InputError(
                f"LCDDConfig.reference_compat: expected a delta_dtype that holds the difference of two weights, "
                f"float32 or float64, got {self.delta_dtype!r}"
            )

    @property
    def distills(self) -> bool:
        return self.loss == "kl"

    @property
    def lr_warmup(self) -> int:
        return self.lr_warmup_steps
