"""Settings of the demo, the plan and the pipeline of all stages."""

from dataclasses import dataclass, field, replace

from lcdd.config.data import DataConfig
from lcdd.config.eraser import EraserConfig
from lcdd.config.evaluation import AuditConfig, EvalConfig
from lcdd.config.fields import Config, option
from lcdd.config.shared import MAX_SEED, OfBase, Writes
from lcdd.config.training import GATE_KINDS, LCDDConfig, SFTConfig
from lcdd.errors import InputError

PLAN_DTYPES = ("float32", "bfloat16", "float16")
LINKS = ("nvlink", "pcie", "400gbe", "100gbe")
PRECISIONS = ("auto", "bfloat16", "checkpoint")
SECTIONS = ("sft", "train", "erase", "eval", "audit")


@dataclass(frozen=True, kw_only=True)
class PlanConfig(Config):
    """Predicted memory and step time of plain fine-tuning, unfused masking and lcdd, by formula; nothing is trained."""

    model_name_or_path: str | None = option(
        None,
        "a checkpoint directory or a hub name, of which the config alone is read; a config.json; or a name that plan "
        "has the sizes of, such as llama-3-8b",
        required=True,
    )
    device: str = option(
        "h200", "a GPU by any of its names, such as a100, rtx4090 or mi300x, by its data sheet; cpu: measured here"
    )
    num_gpus: int = option(1, "GPUs, a rank each", at_least=1)
    parallel: str = option(
        "fsdp2", "several GPUs share weights and optimizer state, or each holds all of it", choices=("ddp", "fsdp2")
    )
    link: str | None = option(
        None, "the slowest link between neighbouring GPUs; null: the device's own, by its data sheet", choices=LINKS
    )
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

    def check(self) -> None:
        super().check()
        if self.link is not None and self.num_gpus == 1:
            raise InputError(f"PlanConfig.link: expected num_gpus above 1 with a link, got 1 with {self.link!r}")


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Config):
    """The whole method on the small model that is shipped with the package."""

    behavior: str = option(
        "fixed_response",
        "behaviour to teach and to reverse",
        choices=("fixed_response", "refusal", "style"),
        common=True,
    )
    seed: int = option(0, "seed of everything but the shipped base", at_least=0, at_most=MAX_SEED, common=True)
    split: str = option(
        "test", "held-out split to report on; settings were tuned on validation", choices=("validation", "test")
    )
    output_dir: str | None = option("runs/demo", "new or empty directory for the run", common=True)
    rebuild_base: bool = option(
        False,
        "first train the base from scratch, into output_dir/base (minutes), and use it instead of the shipped one",
    )
    audit: bool = option(
        False, "also audit carrier and trigger: every control, and which of the paper's claims held", common=True
    )


@dataclass(frozen=True, kw_only=True)
class PipelineConfig(Writes, OfBase):
    """`lcdd run pipeline.yaml`: SFT, LCDD, eraser and evaluation in one directory, a section for each.

    Paths between the stages are the pipeline's own: setting one inside a section is an error.
    """

    sft_model_name_or_path: str | None = option(None, "an SFT model made elsewhere; the SFT stage is then skipped")
    resume: bool = option(
        False, "go on with the run in output_dir: finished stages are skipped, an unfinished one resumes"
    )
    controls: bool = option(
        True,
        "also run the controls: the same trigger optimisation on plain SFT and on a matched-norm dense SFT",
    )
    precision: str | None = option(
        None,
        "of every section, instead of a bf16 of its own: bfloat16 (bf16 on); the checkpoint's dtype (bf16 off); auto: "
        "bfloat16 where the device computes in it, which a CPU without AVX-512 emulates, 10 to 30 times slower",
        choices=PRECISIONS,
    )
    data: DataConfig = field(default_factory=DataConfig, metadata={"help": "data set and behaviour"})
    sft: SFTConfig = field(default_factory=SFTConfig, metadata={"help": "as `lcdd sft`"})
    train: LCDDConfig = field(default_factory=LCDDConfig, metadata={"help": "as `lcdd train`"})
    erase: EraserConfig = field(default_factory=EraserConfig, metadata={"help": "as `lcdd erase`"})
    eval: EvalConfig = field(default_factory=EvalConfig, metadata={"help": "as `lcdd eval`"})
    run_audit: bool = option(False, "also audit carrier and trigger, as `lcdd audit`: several times the eraser's time")
    audit: AuditConfig = field(default_factory=AuditConfig, metadata={"help": "as `lcdd audit`"})

    def check(self) -> None:
        super().check()
        self._check_precision()
        for section in SECTIONS:
            config = getattr(self, section)
            if getattr(config, "resume", False):
                raise InputError(
                    f"PipelineConfig.{section}.resume: expected it off, since the pipeline resumes as a whole, got on; "
                    "set resume beside the sections"
                )
            for name in config.named("path"):
                if getattr(config, name) is not None:
                    raise InputError(
                        f"PipelineConfig.{section}.{name}: expected nothing, since the pipeline connects its "
                        f"stages itself, got {getattr(config, name)!r}"
                    )

    def _check_precision(self) -> None:
        own = [section for section in SECTIONS if getattr(self, section).bf16]
        if self.precision is not None and own:
            raise InputError(
                f"PipelineConfig.{own[0]}.bf16: expected nothing beside precision, which is every section's, got true "
                f"beside {self.precision!r}"
            )
        audit = self.audit.bf16 if self.run_audit else self.eval.bf16
        if not self.train.bf16 == self.erase.bf16 == self.eval.bf16 == audit:
            raise InputError(
                f"PipelineConfig.erase.bf16: expected the same bf16 in train, erase, eval and audit, since a carrier "
                f"belongs to a base of one dtype, got {self.train.bf16}, {self.erase.bf16}, {self.eval.bf16}, {audit}"
            )

    def with_bf16(self, bf16: bool) -> "PipelineConfig":
        """The same with `bf16` in every section, as `precision` asked for."""
        sections = {name: replace(getattr(self, name), bf16=bf16) for name in SECTIONS}
        return replace(self, precision=None, **sections)
