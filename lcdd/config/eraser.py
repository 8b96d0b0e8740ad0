"""Settings of the eraser."""

from dataclasses import dataclass

from lcdd.config.fields import option
from lcdd.config.shared import MAX_SEED, OfBase, OnDevice, Resumable, Spread, Tracked, WithCarrier, Writes

CHANNEL_KINDS = ("write", "all_residual", "ffn_write", "attn_write", "random", "none")


@dataclass(frozen=True, kw_only=True)
class EraserConfig(Writes, Tracked, Resumable, WithCarrier, Spread, OnDevice, OfBase):
    """SFT-Eraser: the soft prompt that gives the base's answers back (method of the paper, section 4)."""

    sft_model_name_or_path: str | None = option(
        None, "control: learn the trigger on this SFT model instead, with the carrier's channels", path=True
    )
    num_virtual_tokens: int = option(8, "trigger tokens", at_least=1, at_most=10_000, common=True)
    learning_rate: float = option(0.01, "Adam's learning rate on the trigger", above=0.0, at_most=1e6, common=True)
    lr_scheduler_type: str = option(
        "cosine",
        "schedule of the trigger's learning rate; constant is the authors'",
        choices=("cosine", "constant"),
    )
    max_steps: int = option(400, "optimizer steps", at_least=1, common=True)
    per_device_train_batch_size: int = option(16, "prompts in a step", at_least=1, common=True)
    train_prompts: int = option(200, "prompts of the training split to learn from", at_least=1, common=True)
    validation_prompts: int = option(64, "prompts of the validation split that choose the best trigger", at_least=1)
    eval_steps: int = option(20, "held-out loss every N steps", at_least=1)
    num_starts: int = option(
        1, "random starts, optimised together; the one with the lowest held-out loss is kept", at_least=1, common=True
    )
    max_rows_per_forward: int = option(
        64,
        "prompts times starts in one forward; less needs less memory and changes nothing else",
        at_least=1,
        resumable=True,
    )
    match_scale: str = option(
        "variance",
        "matching in units of the base's own spread per channel, or as it is (the authors'), where the few channels "
        "with the largest activations are all that counts",
        choices=("variance", "none"),
    )
    early_stopping_patience: int = option(
        0, "stop after this many held-out losses in a row that are no better than the best; 0: never", at_least=0
    )
    activation_weight: float = option(
        0.1, "weight of matching the base's activations on the carrier's channels", at_least=0.0
    )
    kl_weight: float = option(0.7, "weight of KL(base || carrier) on the prompt's last positions", at_least=0.0)
    kl_tail_tokens: int = option(1, "prompt positions, from the last, that the KL covers", at_least=1)
    answer_kl_weight: float = option(1.0, "weight of KL(base || carrier) on the base's own answer tokens", at_least=0.0)
    first_token_weight: float = option(
        1.0, "how much more the first token of the base's answer counts in it: there a behaviour is decided", above=0.0
    )
    max_answer_tokens: int = option(32, "tokens of the base's own answers to match", at_least=1)
    l2_weight: float = option(1e-3, "weight of the mean squared norm of the trigger tokens", at_least=0.0)
    max_norm_ratio: float = option(1.5, "ball: radius over the median norm of the token embeddings", above=0.0)
    max_norm: float | None = option(
        None, "ball: absolute radius (the authors' 1.0) instead of max_norm_ratio", above=0.0
    )
    max_grad_norm: float = option(1.0, "clip the gradient's norm to this; 0: off", at_least=0.0)
    channel_kind: str = option("write", "carrier channels that are matched", choices=CHANNEL_KINDS)
    max_prompt_length: int = option(
        512, "longest prompt in tokens; a longer one is an error, unless overlong says otherwise", at_least=1
    )
    seed: int = option(
        0, "seed of the initial tokens, the batches and the random channels", at_least=0, at_most=MAX_SEED
    )
