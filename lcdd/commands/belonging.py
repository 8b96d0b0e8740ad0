"""A base with the carrier, tokenizer and triggers that are to be used with it: they belong together, or it is said."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from lcdd.carrier import Carrier
from lcdd.checkpoint import model_fingerprint
from lcdd.commands.stage import load_weights
from lcdd.config import Answers
from lcdd.data import DATE_KEY, Example, freeze_date, question, recorded_form, use_template
from lcdd.eraser import Trigger
from lcdd.errors import InputError, WrongFingerprint
from lcdd.models import PreTrainedModel, PreTrainedTokenizerBase, Sharding, load_tokenizer, skeleton

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Answering:
    """What answers: a base, not patched yet, and what may be applied to it and put in front of a prompt.

    form: in which it was asked in training (`lcdd.data.question`).
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    carrier: Carrier | None
    trigger: Trigger | None
    form: Mapping[str, Any] = field(default_factory=dict)

    def prompt(self, text: str) -> Example:
        """A user's text, asked as in training."""
        return question(text, self.form)


def load_answering(config: Answers) -> Answering:
    """The model of `generate` and `chat` with its tokenizer, and the carrier and trigger that belong to it.

    Raises:
        InputError: carrier or trigger were made for another model, tokenizer or chat template (unless overridden).
    """
    path = str(config.base_model_name_or_path)
    skeleton(path)
    carrier = Carrier.from_pretrained(config.carrier) if config.carrier else None
    tokenizer, form = tokenizer_as_trained(config, carrier)
    trigger = Trigger.from_pretrained(config.trigger) if config.trigger else None
    if carrier is not None:
        model, carrier, _ = load_base(path, config, carrier, tokenizer, [trigger] if trigger else [])
    else:
        model = load_weights(path, config)
        if trigger is not None:
            _allow(partial(check_learned_on, trigger, model), config)
    return Answering(model=model, tokenizer=tokenizer, carrier=carrier, trigger=trigger, form=form)


def tokenizer_as_trained(config: Answers, carrier: Carrier | None) -> tuple[PreTrainedTokenizerBase, Mapping[str, Any]]:
    """The tokenizer of the model that answers, with the chat template and date of the training, and the form in which
    prompts were asked then: as recorded in the carrier, else with the model; `config` goes before.

    Raises:
        InputError: no tokenizer, no such template, or a date where the template writes none.
    """
    path = str(config.base_model_name_or_path)
    known = carrier.tokenizer if carrier is not None else {}
    tokenizer = load_tokenizer(path)
    form = dict(recorded_form(tokenizer, known))
    if config.prompt_format != "auto":
        form["format"] = config.prompt_format
    if config.chat_template is not None or form.get("format") != "text":
        use_template(tokenizer, config.chat_template, model=path)
    day = freeze_date(tokenizer, config.template_date or known.get(DATE_KEY))
    if day is None and config.template_date is not None:
        raise InputError(f"template_date: expected a chat template that writes a date, got {config.template_date!r}")
    return tokenizer, form


def learned_on(trigger: Trigger, model: PreTrainedModel, patch: Carrier) -> Trigger:
    """The trigger with the fingerprint of the patched model, which is that of the carrier when it is folded."""
    with patch.applied(model, check=False):
        return replace(trigger, metadata={**trigger.metadata, "model_fingerprint": model_fingerprint(model)})


def check_learned_on(trigger: Trigger, model: PreTrainedModel) -> None:
    """Raise unless the trigger fits, and `model` is the one that it was learned on or the base of that."""
    trigger.check_fits(model)
    known = [trigger.metadata[key] for key in ("base_fingerprint", "model_fingerprint") if key in trigger.metadata]
    found = model_fingerprint(model)
    if known and found not in known:
        raise WrongFingerprint(
            f"trigger: expected the model that it was learned on or its base, of fingerprint "
            f"{' or '.join(f'{one[:16]}…' for one in known)}, got one of {found[:16]}…"
        )


def _allow(check: Callable[[], None], config: Any) -> str | None:
    """The difference that a check finds, where `config.fingerprint_override` lets it pass with a warning."""
    try:
        check()
    except WrongFingerprint as error:
        if not config.fingerprint_override:
            raise InputError(
                f"{error}. To go on nevertheless, and have that recorded: --fingerprint_override"
            ) from None
        logger.warning("overridden: %s", error)
        return str(error)
    return None


def load_base(
    path: str | None,
    config: Any,
    carrier: Carrier,
    tokenizer: PreTrainedTokenizerBase,
    triggers: Iterable[Trigger] = (),
    *,
    shard: Sharding | None = None,
) -> tuple[PreTrainedModel, Carrier, list[str]]:
    """Load the base, and check the fingerprints in the carrier and the triggers against it and the tokenizer.

    Under `config.fingerprint_override` a fingerprint that differs is a warning; the carrier then comes back as one of
    this base and tokenizer. Third come those differences, and what `config.checkpoint_override` let pass, for whoever
    writes a result to record. shard: as of `load_model`.

    Raises:
        InputError: a fingerprint differs, or (which nothing overrides) the shapes do.
    """
    found = [_allow(partial(carrier.check_tokenizer, tokenizer), config)]
    overrides: list[str] = []
    model = load_weights(path, config, overrides, shard=shard)
    found.append(_allow(partial(carrier.check_base, model), config))
    if any(found):
        carrier = replace(carrier.with_tokenizer(tokenizer), base_fingerprint=model_fingerprint(model))
    for trigger in triggers:
        found.append(_allow(partial(trigger.check_base, carrier.base_fingerprint), config))
    return model, carrier, overrides + [difference for difference in found if difference]
