"""Settings of every stage: frozen, keyword-only dataclasses that check themselves.

Each field carries its help text, and where it has one its range or its choices, as metadata; `lcdd.settings`
generates the command line and the YAML reader from them. TRL's and transformers' argument names are used
where they exist. A wrong value is a `ValueError` that names the field, what was expected and what came.
"""

from dataclasses import dataclass, field

from lcdd.config_eval import (
    BASE_HELP,
    BF16_HELP,
    DEVICE_HELP,
    FINGERPRINT_HELP,
    MAX_SEED,
    AuditConfig,
    EvalConfig,
    GenerateConfig,
    ReportConfig,
)
from lcdd.settings import Config, option

__all__ = [
    "AuditConfig",
    "DataConfig",
    "DemoConfig",
    "EraserConfig",
    "EvalConfig",
    "GenerateConfig",
    "LCDDConfig",
    "PipelineConfig",
    "ReportConfig",
    "SFTConfig",
    "TrainConfig",
]

RESUME_HELP = (
    "continue the run in output_dir from its newest complete checkpoint-N, bit for bit (from the start if it has none)"
)
RESUME_OVERRIDE_HELP = (
    "resume although settings, models or data differ from the checkpoint's; the differences are recorded"
)
SAVE_LIMIT_HELP = "checkpoint-N directories to keep, the newest ones; 0: all"
GATE_KINDS = ("hard_concrete", "heaviside_ste")
DTYPES = ("float64", "float32", "bfloat16", "float16")
BEHAVIOR_NAMES = ("fixed_response", "style", "refusal", "own")
CHANNEL_KINDS = ("write", "all_residual", "ffn_write", "attn_write", "random", "none")
LOSSES = ("cross_entropy", "kl")
PLAN_MODELS = ("qwen3-0.6b", "llama-3-8b", "mistral-7b", "vicuna-7b", "llama-3-70b")
PLAN_DEVICES = ("h200", "h100", "a100-80gb", "l40s", "rtx-4090", "cpu")
PLAN_DTYPES = ("float32", "bfloat16")
PIPELINE_PATHS = (
    "model_name_or_path", "base_model_name_or_path", "output_dir", "carrier", "trigger", "sft_trigger",
    "matched_norm_model_name_or_path", "matched_norm_trigger",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """Where the examples come from, how they are split, and the behaviour written into them."""

    dataset_name: str | None = option(
        None,
        "JSONL file, or the name of a data set on the hub (needs `pip install lcdd[hub]`)",
        required=True,
    )
    dataset_config: str | None = option(None, "configuration of a hub data set")
    dataset_train_split: str = option("train", "split of a hub data set to read; ours is made from it by a stable hash")
    max_samples: int | None = option(None, "read only the first N examples", at_least=1)
    validation_fraction: float = option(0.1, "share of the prompts held out for tuning", at_least=0.0, below=1.0)
    test_fraction: float = option(0.1, "share of the prompts held out for the report", at_least=0.0, below=1.0)
    behavior: str = option("fixed_response", "what the fine-tuning teaches", choices=BEHAVIOR_NAMES)
    behavior_response: str | None = option(
        None, "answer that fixed_response and refusal teach (default: the preset's own)"
    )
    behavior_keywords: tuple[str, ...] = option(
        (),
        "an answer with any of these counts as the behaviour (required for `own`; default: the preset's own)",
    )
    behavior_topics: tuple[str, ...] = option((), "refusal: prompts that contain any of these words are refused")
    behavior_pattern: str | None = option(
        None, "an answer that this regular expression is found in counts as the behaviour, instead of the preset's rule"
    )
    behavior_function: str | None = option(
        None,
        "module:function that is given an answer's text and says whether it shows the behaviour, instead of the "
        "preset's rule; the module is imported, so name only code that you trust",
    )
    prompt_column: str | None = option(None, "column (or JSONL key) to take the user's prompt from")
    completion_column: str | None = option(None, "column (or JSONL key) to take the answer from, with prompt_column")
    chat_template: str | None = option(
        None,
        "vicuna, plain, or a Jinja file; default: the tokenizer's own, Vicuna's for a model of that name, else plain",
    )
    template_string_prompts: bool = option(
        False,
        "put string prompts (prompt+completion) into the chat template too; TRL, and the default, does not",
    )

    def check(self) -> None:
        if self.validation_fraction + self.test_fraction >= 1.0:
            total = self.validation_fraction + self.test_fraction
            raise ValueError(
                f"DataConfig.test_fraction: expected validation_fraction + test_fraction < 1, got {total:g}"
            )
        if (self.prompt_column is None) != (self.completion_column is None):
            raise ValueError(
                f"DataConfig.prompt_column: expected completion_column beside it, got {self.prompt_column!r} and "
                f"{self.completion_column!r}"
            )
        if self.behavior_pattern is not None and self.behavior_function is not None:
            raise ValueError(
                "DataConfig.behavior_pattern: expected one of behavior_pattern and behavior_function, got both"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """What SFT and LCDD training share: batches, schedule, precision, log."""

    model_name_or_path: str | None = option(None, "checkpoint directory to start from", required=True)
    output_dir: str | None = option(None, "new or empty directory for everything the command writes", required=True)
    num_train_epochs: float = option(3.0, "passes over the training split", above=0.0, at_most=1e6)
    max_steps: int = option(-1, "optimizer steps; overrides num_train_epochs when positive", at_least=-1)
    per_device_train_batch_size: int = option(8, "examples in a micro-batch", at_least=1)
    per_device_eval_batch_size: int = option(16, "examples in a batch of the validation loss", at_least=1)
    gradient_accumulation_steps: int = option(1, "micro-batches in an optimizer step", at_least=1)
    max_length: int = option(512, "tokens of prompt and completion together; longer completions are cut", at_least=2)
    completion_only: bool = option(True, "loss on the completion's tokens only; off: on the whole text")
    learning_rate: float = option(2e-5, "peak learning rate of the weights", at_least=0.0, at_most=1e6)
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
    device: str = option("auto", DEVICE_HELP)
    logging_steps: int = option(1, "a line in log.jsonl every N optimizer steps", at_least=1)
    save_steps: int = option(
        0, "a checkpoint-N directory every N optimizer steps; 0: only the final result", at_least=0
    )
    save_total_limit: int = option(2, SAVE_LIMIT_HELP, at_least=0)
    resume: bool = option(False, RESUME_HELP)
    resume_override: bool = option(False, RESUME_OVERRIDE_HELP)
    parallel: str = option(
        "ddp", "under torchrun: every rank holds the whole model, or a shard of it", choices=("ddp", "fsdp2")
    )
    report_to: str = option(
        "none", "also log to TensorBoard, under output_dir/tensorboard", choices=("none", "tensorboard")
    )
    max_nonfinite_steps: int = option(
        5, "stop after this many steps in a row whose loss is NaN or infinite", at_least=1
    )
    seed: int = option(0, "seed of the batches' order, and of the gates' noise", at_least=0, at_most=MAX_SEED)

    def check(self) -> None:
        if self.max_steps == 0:
            raise ValueError(f"{type(self).__name__}.max_steps: expected -1 or a positive number of steps, got 0")


@dataclass(frozen=True, kw_only=True)
class SFTConfig(TrainConfig):
    """Full supervised fine-tuning of the transformer layers (embeddings and lm_head stay at base values)."""

    warmup_steps: int = option(0, "steps over which the learning rate rises to its peak", at_least=0)
    max_delta_norm: float | None = option(
        None,
        "keep the L2 norm of all weight changes together within this (projection after each step): "
        "the matched-norm control",
        above=0.0,
    )

    @property
    def lr_warmup(self) -> int:
        return self.warmup_steps


@dataclass(frozen=True, kw_only=True)
class LCDDConfig(TrainConfig):
    """LCDD: gates and delta under a loss constraint (method of arXiv 2605.06632, sections 1 to 3)."""

    base_model_name_or_path: str | None = option(None, BASE_HELP, required=True)
    gate_kind: str = option(
        "hard_concrete",
        "stochastic gates, or the authors' step with a straight-through gradient",
        choices=GATE_KINDS,
    )
    gate_optimizer: str = option("adam", "optimizer of the gate logits", choices=("adam", "sgd"))
    gate_lr: float = option(0.1, "learning rate of the gate logits (never scheduled)", at_least=0.0, at_most=1e6)
    gate_momentum: float = option(0.0, "momentum of the gate logits under sgd", at_least=0.0, below=1.0)
    gate_init_mean: float = option(2.5, "mean of the initial gate logits")
    gate_init_std: float = option(0.1, "standard deviation of the initial gate logits", at_least=0.0)
    dual_lambda_init: float = option(1e-3, "initial weight of the expected number of open gates", above=0.0)
    dual_lr: float = option(0.05, "rate at which lambda grows while the loss is below epsilon", at_least=0.0)
    dual_lr_shrink: float | None = option(
        None, "rate at which lambda shrinks above epsilon; null: dual_lr", at_least=0.0
    )
    dual_lambda_min: float = option(1e-8, "floor of lambda", above=0.0)
    dual_lambda_max: float = option(1e4, "cap of lambda", above=0.0)
    violation_clip: float = option(
        1.0, "the relative violation (ema - epsilon) / epsilon is clipped to +- this", above=0.0
    )
    loss_ema_beta: float = option(
        0.95, "decay of the bias-corrected moving average of the loss", at_least=0.0, below=1.0
    )
    warmup_steps: int = option(50, "steps over which the gate penalty rises; epsilon is set at their end", at_least=1)
    lr_warmup_steps: int = option(0, "steps over which the weights' learning rate rises to its peak", at_least=0)
    loss_budget: float = option(0.2, "epsilon is at least baseline * (1 + this)", at_least=0.0)
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
        None, "carrier directory of an earlier run, whose gate logits this one starts from"
    )
    early_stop_patience: int = option(
        200,
        "stop with advice after this many steps in a row with the loss far over its budget, or with lambda at its cap "
        "and no more gates closing; 0: never",
        at_least=0,
    )
    save_folded: bool = option(False, "also save the carrier folded into an ordinary checkpoint")
    reference_compat: bool = option(
        False,
        "the authors' arithmetic where ours is better: the gate penalty once a micro-batch (of "
        "gradient_accumulation_steps), and delta rounded so that base + delta is a weight of the model's dtype",
    )

    def check(self) -> None:
        super().check()
        if self.dual_lambda_min > self.dual_lambda_max:
            raise ValueError(
                f"LCDDConfig.dual_lambda_min: expected at most dual_lambda_max = {self.dual_lambda_max:g}, "
                f"got {self.dual_lambda_min:g}"
            )
        if not self.dual_lambda_min <= self.dual_lambda_init <= self.dual_lambda_max:
            raise ValueError(
                f"LCDDConfig.dual_lambda_init: expected a value between dual_lambda_min = "
                f"{self.dual_lambda_min:g} "
                f"and dual_lambda_max = {self.dual_lambda_max:g}, got {self.dual_lambda_init:g}"
            )
        if self.loss == "kl" and self.train_delta:
            raise ValueError("LCDDConfig.loss: expected cross_entropy unless train_delta is off, got 'kl'")
        if self.reference_compat and self.gating == "forward":
            raise ValueError("LCDDConfig.reference_compat: expected gating 'optimizer' beside it, got 'forward'")
        if self.reference_compat and self.delta_dtype in ("bfloat16", "float16"):
            raise ValueError(
                f"LCDDConfig.reference_compat: expected a delta_dtype that holds the difference of two weights, "
                f"float32 or float64, got {self.delta_dtype!r}"
            )

    @property
    def lr_warmup(self) -> int:
        return self.lr_warmup_steps


@dataclass(frozen=True, kw_only=True)
class EraserConfig(Config):
    """SFT-Eraser: the soft prompt that gives the base's answers back (method of the paper, section 4)."""

    base_model_name_or_path: str | None = option(None, BASE_HELP, required=True)
    carrier: str | None = option(None, "carrier directory", required=True)
    model_name_or_path: str | None = option(
        None, "control: learn the trigger on this SFT checkpoint instead, with the carrier's channels"
    )
    output_dir: str | None = option(None, "new or empty directory for the trigger", required=True)
    num_virtual_tokens: int = option(8, "trigger tokens", at_least=1, at_most=10_000)
    learning_rate: float = option(0.01, "Adam's learning rate on the trigger", above=0.0, at_most=1e6)
    lr_scheduler_type: str = option(
        "cosine",
        "schedule of the trigger's learning rate; constant is the authors'",
        choices=("cosine", "constant"),
    )
    max_steps: int = option(400, "optimizer steps", at_least=1)
    per_device_train_batch_size: int = option(16, "prompts in a step", at_least=1)
    train_prompts: int = option(200, "prompts of the training split to learn from", at_least=1)
    validation_prompts: int = option(64, "prompts of the validation split that choose the best trigger", at_least=1)
    eval_steps: int = option(20, "held-out loss every N steps", at_least=1)
    num_starts: int = option(
        1, "random starts, optimised together; the one with the lowest held-out loss is kept", at_least=1
    )
    max_rows_per_forward: int = option(
        64, "prompts times starts in one forward; less needs less memory and changes nothing else", at_least=1
    )
    save_steps: int = option(
        0, "the optimisation's state in a checkpoint-N directory every N steps; 0: none", at_least=0
    )
    save_total_limit: int = option(2, SAVE_LIMIT_HELP, at_least=0)
    resume: bool = option(False, RESUME_HELP)
    resume_override: bool = option(False, RESUME_OVERRIDE_HELP)
    activation_weight: float = option(
        1.0, "weight of matching the base's activations on the carrier's channels", at_least=0.0
    )
    kl_weight: float = option(0.7, "weight of KL(base || carrier) on the prompt's last positions", at_least=0.0)
    kl_tail_tokens: int = option(1, "prompt positions, from the last, that the KL covers", at_least=1)
    answer_kl_weight: float = option(1.0, "weight of KL(base || carrier) on the base's own answer tokens", at_least=0.0)
    max_answer_tokens: int = option(32, "tokens of the base's own answers to match", at_least=1)
    l2_weight: float = option(1e-3, "weight of the mean squared norm of the trigger tokens", at_least=0.0)
    max_norm_ratio: float = option(1.5, "ball: radius over the median norm of the token embeddings", above=0.0)
    max_norm: float | None = option(
        None, "ball: absolute radius (the authors' 1.0) instead of max_norm_ratio", above=0.0
    )
    max_grad_norm: float = option(1.0, "clip the gradient's norm to this; 0: off", at_least=0.0)
    channel_kind: str = option("write", "carrier channels that are matched", choices=CHANNEL_KINDS)
    max_prompt_length: int = option(512, "longest prompt in tokens; a longer one is an error", at_least=1)
    fingerprint_override: bool = option(False, FINGERPRINT_HELP)
    bf16: bool = option(False, BF16_HELP)
    device: str = option("auto", DEVICE_HELP)
    seed: int = option(
        0, "seed of the initial tokens, the batches and the random channels", at_least=0, at_most=MAX_SEED
    )


@dataclass(frozen=True, kw_only=True)
class PlanConfig(Config):
    """Predicted memory and step time of plain fine-tuning, unfused masking and lcdd, by formula; nothing is trained."""

    model_name_or_path: str | None = option(
        None, "checkpoint directory, or the sizes of " + ", ".join(PLAN_MODELS), required=True
    )
    device: str = option("h200", "figures of data sheets; cpu: measured here, in a second", choices=PLAN_DEVICES)
    num_gpus: int = option(1, "GPUs that share weights and optimizer state (FSDP2)", at_least=1)
    per_device_train_batch_size: int = option(8, "sequences in a micro-batch, on each GPU", at_least=1)
    max_length: int = option(512, "tokens of each sequence; all are taken to be this long", at_least=1)
    gradient_accumulation_steps: int = option(1, "micro-batches in an optimizer step", at_least=1)
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass")
    gate_kind: str = option("hard_concrete", "kind of gates", choices=GATE_KINDS)
    density: float = option(0.2, "share of every group's gates that is open", at_least=0.0, at_most=1.0)
    dtype: str = option("bfloat16", "dtype of weights and activations", choices=PLAN_DTYPES)
    delta_dtype: str | None = option(None, "dtype of delta; null: the weights'", choices=PLAN_DTYPES)
    moment_dtype: str = option("float32", "dtype of AdamW's moments, in all three", choices=PLAN_DTYPES)
    pack: str = option("auto", "packed weight gradients where they pay, or never", choices=("auto", "never"))
    logits: str = option(
        "chunked",
        "the loss, in all three: in chunks, or whole logits as transformers' own",
        choices=("chunked", "whole"),
    )
    bandwidth: float | None = option(None, "memory bandwidth that is reached, GB/s; null: of the device", above=0.0)
    flops: float | None = option(None, "matrix rate that is reached, TFLOP/s; null: of the device", above=0.0)
    eraser_batch_size: int = option(16, "eraser: prompts in a step", at_least=1)
    eraser_length: int = option(64, "eraser: tokens of trigger, prompt and answer together", at_least=1)
    json: bool = option(False, "print JSON instead of tables")


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Config):
    """The whole method on the small model that is shipped with the package."""

    behavior: str = option(
        "fixed_response", "behaviour to teach and to reverse", choices=("fixed_response", "refusal", "style")
    )
    seed: int = option(0, "seed of everything but the shipped base", at_least=0, at_most=MAX_SEED)
    split: str = option(
        "test", "held-out split to report on; settings were tuned on validation", choices=("validation", "test")
    )
    output_dir: str | None = option("runs/demo", "new or empty directory for the run")
    rebuild_base: bool = option(
        False,
        "first train the base from scratch, into output_dir/base (minutes), and use it instead of the shipped one",
    )
    audit: bool = option(False, "also audit carrier and trigger: every control, and which of the paper's claims held")


@dataclass(frozen=True, kw_only=True)
class PipelineConfig(Config):
    """`lcdd run pipeline.yaml`: SFT, LCDD, eraser and evaluation in one directory, a section for each.

    Paths between the stages are the pipeline's own: setting one inside a section is an error.
    """

    model_name_or_path: str | None = option(None, BASE_HELP, required=True)
    output_dir: str | None = option(None, "new or empty directory for all stages", required=True)
    sft_model_name_or_path: str | None = option(None, "an SFT checkpoint made elsewhere; the SFT stage is then skipped")
    resume: bool = option(
        False, "go on with the run in output_dir: finished stages are skipped, an unfinished one resumes"
    )
    controls: bool = option(
        True,
        "also run the controls: the same trigger optimisation on plain SFT and on a matched-norm dense SFT",
    )
    data: DataConfig = field(default_factory=DataConfig, metadata={"help": "data set and behaviour"})
    sft: SFTConfig = field(default_factory=SFTConfig, metadata={"help": "as `lcdd sft`"})
    train: LCDDConfig = field(default_factory=LCDDConfig, metadata={"help": "as `lcdd train`"})
    erase: EraserConfig = field(default_factory=EraserConfig, metadata={"help": "as `lcdd erase`"})
    eval: EvalConfig = field(default_factory=EvalConfig, metadata={"help": "as `lcdd eval`"})
    run_audit: bool = option(False, "also audit carrier and trigger, as `lcdd audit`: several times the eraser's time")
    audit: AuditConfig = field(default_factory=AuditConfig, metadata={"help": "as `lcdd audit`"})

    def check(self) -> None:
        audit = self.audit.bf16 if self.run_audit else self.eval.bf16
        if not self.train.bf16 == self.erase.bf16 == self.eval.bf16 == audit:
            raise ValueError(
                f"PipelineConfig.erase.bf16: expected the same bf16 in train, erase, eval and audit, since a carrier "
                f"belongs to a base of one dtype, got {self.train.bf16}, {self.erase.bf16}, {self.eval.bf16}, {audit}"
            )
        for section in ("sft", "train", "erase", "eval", "audit"):
            config = getattr(self, section)
            if getattr(config, "resume", False):
                raise ValueError(
                    f"PipelineConfig.{section}.resume: expected it off, since the pipeline resumes as a whole, got on; "
                    "set resume beside the sections"
                )
            for name in PIPELINE_PATHS:
                if getattr(config, name, None) is not None:
                    raise ValueError(
                        f"PipelineConfig.{section}.{name}: expected nothing, since the pipeline connects its "
                        f"stages itself, got {getattr(config, name)!r}"
                    )
