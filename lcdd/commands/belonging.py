"""A base with the carrier, tokenizer and triggers that are to be used with it: they belong together, or it is said."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from lcdd.carrier import Carrier
from lcdd.checkpoint import model_fingerprint
from lcdd.commands.stage import load_weights
from lcdd.eraser import Trigger
from lcdd.errors import InputError, WrongFingerprint
from lcdd.models import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def load_base(
    path: str | None,
    config: Any,
    carrier: Carrier,
    tokenizer: PreTrainedTokenizerBase,
    triggers: Iterable[Trigger] = (),
) -> tuple[PreTrainedModel, Carrier, list[str]]:
    """Load the base, and check the fingerprints in the carrier and the triggers against it and the tokenizer.

    Under `config.fingerprint_override` a fingerprint that differs is a warning; the carrier then comes back as one of
    this base and tokenizer, and third come the differences, for whoever writes a result to record.

    Raises:
        InputError: a fingerprint differs, or (which nothing overrides) the shapes do.
    """
    overrides: list[str] = []

    def check(what: Callable[[Any], None], against: Any) -> None:
        try:
            what(against)
        except WrongFingerprint as error:
            if not config.fingerprint_override:
                raise InputError(
                    f"{error}. To go on nevertheless, and have that recorded: --fingerprint_override"
                ) from None
            logger.warning("overridden: %s", error)
            overrides.append(str(error))

    check(carrier.check_tokenizer, tokenizer)
    model = load_weights(path, config)
    check(carrier.check_base, model)
    if overrides:
        carrier = replace(carrier.with_tokenizer(tokenizer), base_fingerprint=model_fingerprint(model))
    for trigger in triggers:
        check(trigger.check_base, carrier.base_fingerprint)
    return model, carrier, overrides
