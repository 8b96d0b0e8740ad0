"""What can be set: typed settings with help and ranges, from which flags and YAML come."""

from lcdd.config.data import BEHAVIOR_NAMES, DataConfig
from lcdd.config.eraser import CHANNEL_KINDS, EraserConfig
from lcdd.config.evaluation import (
    AuditConfig,
    ChatConfig,
    ComposeConfig,
    EvalConfig,
    ExportConfig,
    GenerateConfig,
    ReportConfig,
)
from lcdd.config.fields import (
    Config,
    add_flags,
    did_you_mean,
    from_flags,
    from_mapping,
    parse_text,
    read_yaml,
    type_name,
)
from lcdd.config.pipeline import SECTIONS, DemoConfig, PipelineConfig, PlanConfig
from lcdd.config.shared import Answers
from lcdd.config.training import GATE_KINDS, LCDDConfig, SFTConfig, TrainConfig

__all__ = [
    "BEHAVIOR_NAMES",
    "CHANNEL_KINDS",
    "GATE_KINDS",
    "SECTIONS",
    "Answers",
    "AuditConfig",
    "ChatConfig",
    "ComposeConfig",
    "Config",
    "DataConfig",
    "DemoConfig",
    "EraserConfig",
    "EvalConfig",
    "ExportConfig",
    "GenerateConfig",
    "LCDDConfig",
    "PipelineConfig",
    "PlanConfig",
    "ReportConfig",
    "SFTConfig",
    "TrainConfig",
    "add_flags",
    "did_you_mean",
    "from_flags",
    "from_mapping",
    "parse_text",
    "read_yaml",
    "type_name",
]
