"""`lcdd export`: a carrier in a format that others load."""

from lcdd.carrier import Carrier, export_adapter, export_delta
from lcdd.checkpoint import require_new_directory
from lcdd.commands.stage import Say, StageResult, from_anywhere, load_weights, tell
from lcdd.config import ExportConfig
from lcdd.models import skeleton


def export(config: ExportConfig, *, say: Say = tell) -> StageResult:
    """Write the carrier as a delta or as a PEFT adapter, once it has been tried on the base."""
    config.require("base_model_name_or_path", "carrier", "output_dir")
    output = require_new_directory(str(config.output_dir))
    skeleton(str(config.base_model_name_or_path))
    carrier = Carrier.from_pretrained(str(config.carrier))
    base = load_weights(config.base_model_name_or_path, config)
    if config.format == "delta":
        export_delta(carrier, base, output)
        say("Base + delta is the carrier, bit for bit.")
    else:
        export_adapter(carrier, base, output, base_name=from_anywhere(config.base_model_name_or_path))
        say("Merged by PEFT, the adapter gives the carrier's logits.")
    return StageResult(written=(output,), next_step="")
