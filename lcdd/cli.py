"""The command line: `lcdd COMMAND`, one line to start a stage of the pipeline and one to say what to do next.

Flags are generated from the configuration classes. Nothing heavy is imported before the arguments are read, so
`--help` answers at once. A bad input (or a disk that refuses a write) is one line on stderr and exit code 2; a run
that could not go on (out of memory, a loss that stays NaN) is exit code 1; one that SIGTERM ended after a checkpoint
is exit code 143, SIGINT (Ctrl-C) 130.
"""

import argparse
import dataclasses
import importlib
import logging
import os
import re
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from lcdd import __version__
from lcdd.config import (
    AuditConfig,
    ChatConfig,
    ComposeConfig,
    Config,
    DataConfig,
    DemoConfig,
    EraserConfig,
    EvalConfig,
    ExportConfig,
    GenerateConfig,
    LCDDConfig,
    PipelineConfig,
    PlanConfig,
    ReportConfig,
    SFTConfig,
    add_flags,
    did_you_mean,
    from_flags,
    from_mapping,
    read_yaml,
    type_name,
)
from lcdd.errors import InputError, Terminated, ToldByAnotherRank, TrainingStopped

BAD_INPUT, STOPPED, INTERRUPTED = 2, 1, 130
REPORT_BUGS = "Please report it with the command, its settings and the traceback below."


@dataclass(frozen=True, kw_only=True)
class Command:
    """A subcommand: its help, the configurations its flags come from, and the function that gets them."""

    help: str
    configs: tuple[type[Config], ...]
    run: Callable[..., Any]


def _lazy(function: str, module: str | None = None) -> Callable[..., Any]:
    """`lcdd.commands.MODULE.FUNCTION`, imported (and torch with it) only when the command really runs."""

    def run(*configs: Config) -> Any:
        return getattr(importlib.import_module(f"lcdd.commands.{module or function}"), function)(*configs)

    return run


COMMANDS: dict[str, Command] = {
    "demo": Command(
        help="the whole method on the small model shipped with the package: minutes on a laptop",
        configs=(DemoConfig,),
        run=_lazy("run", "demo.demo"),
    ),
    "sft": Command(
        help="fine-tune a base checkpoint on a behaviour", configs=(SFTConfig, DataConfig), run=_lazy("sft")
    ),
    "train": Command(
        help="LCDD: from base and SFT checkpoints to a carrier", configs=(LCDDConfig, DataConfig), run=_lazy("train")
    ),
    "erase": Command(
        help="SFT-Eraser: learn the trigger that gives the base's answers back",
        configs=(EraserConfig, DataConfig),
        run=_lazy("erase"),
    ),
    "eval": Command(
        help="reversal table on held-out prompts, as report.json and report.html",
        configs=(EvalConfig, DataConfig),
        run=_lazy("eval_", "eval"),
    ),
    "audit": Command(
        help="controls of a carrier and its trigger, and which of the paper's claims held in this run",
        configs=(AuditConfig, DataConfig),
        run=_lazy("audit"),
    ),
    "report": Command(help="render report.html again from report.json", configs=(ReportConfig,), run=_lazy("report")),
    "export": Command(
        help="a carrier in a format that others load: a delta by parameter name, or a PEFT adapter",
        configs=(ExportConfig,),
        run=_lazy("export"),
    ),
    "compose": Command(
        help="several carriers of one base as one: their sum, or with some taken away",
        configs=(ComposeConfig,),
        run=_lazy("run", "compose"),
    ),
    "generate": Command(
        help="answer prompts, with a carrier applied and a trigger prepended if given",
        configs=(GenerateConfig,),
        run=_lazy("generate"),
    ),
    "chat": Command(
        help="base, carrier and carrier with trigger side by side, on prompts that you type",
        configs=(ChatConfig,),
        run=_lazy("chat"),
    ),
    "plan": Command(
        help="predicted memory and step time of plain fine-tuning, unfused masking and lcdd, on a named GPU",
        configs=(PlanConfig,),
        run=_lazy("run", "plan.plan"),
    ),
}
SEVERAL_RANKS = ("sft", "train", "erase", "eval", "audit")
"""Commands that torchrun may start on several ranks; of any other, every rank would write the same files."""
RUN_HELP = "all stages on one checkpoint directory, as a YAML file says"
KERNELS_HELP = "which backend serves each kernel here, and whether it passes its self-test"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, not below dozens of lines of usage."""

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"invalid choice: '([^']*)'", message)
        hint = did_you_mean(wrong[1], COMMANDS.keys() | {"run", "kernels"}) if wrong else ""
        self.exit(BAD_INPUT, f"{self.prog}: {message}{hint} (see {self.prog} --help)\n")

    def unrecognized(self, words: Sequence[str]) -> NoReturn:
        """Say which flags are not there, and which are written nearly so."""
        known = [flag for flag in self._option_string_actions if flag.startswith("--")]
        flags = [word.partition("=")[0] for word in words if word.startswith("-")]
        hints = "".join(did_you_mean(flag, known) for flag in flags[:1])
        self.error(f"unrecognized arguments: {' '.join(words)}{hints}")


def build_parser() -> _Parser:
    """The parser of the whole command line."""
    parser = _Parser(
        prog="lcdd",
        allow_abbrev=False,
        description="Reversible fine-tuning: train a behaviour into a sparse carrier (LCDD), and learn the trigger "
        "that switches it off (SFT-Eraser). Start with: lcdd demo",
    )
    parser.add_argument("--version", action="version", version=f"lcdd {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=command.help,
            description=command.help,
            allow_abbrev=False,
            usage=f"lcdd {name} [--config FILE] [--SETTING VALUE ...]",
        )
        sub.set_defaults(parser=sub)
        add_flags(sub, *command.configs)
    run = commands.add_parser(
        "run",
        allow_abbrev=False,
        help=RUN_HELP,
        description=RUN_HELP,
        epilog=_pipeline_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument("pipeline", metavar="pipeline.yaml", help="settings of all stages")
    run.add_argument("--output_dir", default=argparse.SUPPRESS, help="overrides the file's output_dir")
    run.add_argument("--resume", action="store_true", default=argparse.SUPPRESS, help="go on with an interrupted run")
    kernels = commands.add_parser("kernels", help=KERNELS_HELP, description=KERNELS_HELP)
    kernels.add_argument("--aot", action="store_true", help="also compile every Triton kernel for seven GPUs (minutes)")
    return parser


def _pipeline_help() -> str:
    lines = ["the file:"]
    for item in dataclasses.fields(PipelineConfig):
        if isinstance(item.type, type) and issubclass(item.type, Config):
            lines.append(f"  {item.name}: a section; {item.metadata['help']}")
        else:
            lines.append(f"  {item.name} ({type_name(item.type)}): {item.metadata['help']}")
    return "\n".join(lines)


def _execute(arguments: argparse.Namespace) -> Any:
    """Settings first, which are read at once; then whatever takes seconds to import, and the command."""
    if arguments.command == "kernels":
        _loading()
        from lcdd_kernels.report_card import main as report_card

        return report_card(["--aot"] if arguments.aot else [])
    if os.environ.get("WORLD_SIZE", "1") != "1" and arguments.command not in SEVERAL_RANKS:
        raise InputError(
            f"expected one process, got torchrun's several, which only {', '.join(SEVERAL_RANKS)} share their work over"
        )
    if arguments.command == "run":
        values = read_yaml(arguments.pipeline)
        values |= {key: value for key, value in vars(arguments).items() if key in ("output_dir", "resume")}
        configs: tuple[Any, ...] = (from_mapping(PipelineConfig, values, where=arguments.pipeline),)
        function = _lazy("run")
    else:
        command = COMMANDS[arguments.command]
        configs, function = from_flags(arguments, *command.configs), command.run
    _loading()
    from lcdd.checkpoint import only_writer
    from lcdd.models import hide_progress_bars

    hide_progress_bars()
    with only_writer(getattr(configs[0], "output_dir", None)):
        return function(*configs)


def _loading() -> None:
    """A first line at once, where importing takes seconds; what libraries warn of that no user can change is quiet."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for category in (FutureWarning, DeprecationWarning, UserWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(torch|transformers|datasets|huggingface_hub)\b")
    if "torch" not in sys.modules and os.environ.get("RANK", "0") == "0":
        print("Loading PyTorch ...", file=sys.stderr, flush=True)


def _failed(command: str, error: Exception) -> int:
    """One line for what the user can mend, and its exit code; anything else is raised again, as a bug of ours."""
    if isinstance(error, ToldByAnotherRank):
        verdict = _verdict(error.error)
        return verdict[1] if verdict else STOPPED
    who = f"lcdd {command}"
    if os.environ.get("WORLD_SIZE", "1") != "1":
        who += f", rank {os.environ.get('RANK', '0')}"
    verdict = _verdict(error)
    if verdict is None:
        print(f"{who}: this is a bug of lcdd {__version__}. {REPORT_BUGS}", file=sys.stderr)
        raise error
    print(f"{who}: {verdict[0]}", file=sys.stderr)
    return verdict[1]


def _verdict(error: Exception) -> tuple[str, int] | None:
    """What a user is told, and the exit code; None: a bug of ours."""
    if isinstance(error, TrainingStopped):  # its memory table has lines of its own
        return str(error), 128 + error.signal if isinstance(error, Terminated) else STOPPED  # as shells number them
    if isinstance(error, InputError | OSError) or _backend_refused(error):  # a disk that is full, a file out of reach
        return " ".join(str(error).split()), BAD_INPUT
    if _out_of_memory(error):
        return "out of memory; smaller batches or shorter texts need less", STOPPED
    return None


def _backend_refused(error: Exception) -> bool:
    if not isinstance(error, RuntimeError):
        return False
    from lcdd_kernels import BackendUnavailable

    return isinstance(error, BackendUnavailable)


def _out_of_memory(error: Exception) -> bool:
    if not isinstance(error, RuntimeError):
        return False
    from lcdd.trainer import is_out_of_memory  # imports torch

    return is_out_of_memory(error)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    parser = build_parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        asked: _Parser = getattr(arguments, "parser", parser)
        asked.unrecognized(unknown)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        result = _execute(arguments)
    except Exception as error:
        return _failed(arguments.command, error)
    except KeyboardInterrupt:
        print(f"lcdd {arguments.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    if isinstance(result, int):
        return result
    for path in getattr(result, "written", ()):
        print(f"wrote {path}")
    if getattr(result, "problem", None):
        print(f"WARNING {result.problem}", file=sys.stderr)
    if getattr(result, "next_step", ""):
        print(f"next: {_wrapped(result.next_step)}")
    return 0


def _wrapped(command: str) -> str:
    """A command over several lines, where it is wider than the terminal, that a shell takes as one.

    `lcdd` itself is written as it can be called from any shell, where it is not on the PATH.
    """
    script = Path(sys.argv[0])
    if command.startswith("lcdd ") and script.name == "lcdd" and shutil.which("lcdd") is None:
        command = shlex.quote(str(script.absolute())) + command.removeprefix("lcdd")
    width = shutil.get_terminal_size((100, 24)).columns
    lines = [""]
    for part in command.split(" --"):
        word = part if lines == [""] else f"--{part}"
        if len(lines[-1]) + len(word) + 3 > width - (6 if len(lines) == 1 else 0):
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return " \\\n  ".join(line for line in lines if line)
