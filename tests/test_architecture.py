"""Which way imports point, what importing does not do, and that every documented command is there.

`TIERS` is the whole rule: a module may import modules of lower tiers, never of its own or a higher one.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lcdd.cli import build_parser, main

ROOT = Path(__file__).resolve().parents[1]

# Lowest first. A name with a trailing dot is a folder: its modules may import each other, without circles.
TIERS: dict[str, list[tuple[str, ...]]] = {
    "lcdd_kernels": [
        ("checks", "reference."),
        ("backends", "matrix_checks", "pack_plan"),
        ("triton_kernels.", "native", "testing", "ops."),
        ("cases.", "aot", "cuda", "gated", "losses", "matching", "packed"),
        ("functional",),
        ("",),  # the package itself
        ("report_card",),
    ],
    "lcdd": [
        ("shards",),
        (
            "",
            "settings",
            "runlog",
            "dual",
            "checkpoint",
            "schedules",
            "charts",
            "report_style",
            "tables",
            "plan_tables",
            "lock",
            "devices",
            "templates",
            "claims",
        ),
        ("config_eval", "report_parts"),
        ("report_audit",),
        ("demo_tasks", "demo_words", "config", "models", "report", "training_state"),
        ("reference_compat", "packed_rows"),
        (
            "attach",
            "parallel",
            "sft",
            "stopping",
            "data",
            "gates",
            "costs",
            "diagnose",
            "stage",
            "trigger",
            "demo_rebuild",
            "eraser_batches",
            "trigger_search",
        ),
        ("behaviors", "guards", "losses", "packed", "modules", "patching", "perplexity", "plan", "utility"),
        ("carrier",),
        ("ablate", "belonging", "optimizer", "prepare", "eraser", "evaluate"),
        ("trainer", "eval_stage", "ledger"),
        ("audit",),
        ("audit_stage",),
        ("pipeline", "demo"),
        ("cli",),
        ("__main__",),
    ],
}
# An import inside a function that points up, and why it has to.
UPWARD = {
    ("lcdd_kernels.backends", "lcdd_kernels.testing"): "a backend's first use runs its known-answer self-test",
}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in TIERS
    for path in sorted((ROOT / package).rglob("*.py"))
}


def imports(path: Path, name: str) -> dict[str, bool]:
    """Imported module -> whether at import time (not inside a function); type checking's own are left out."""
    found: dict[str, bool] = {}

    def add(module: str, at_import: bool) -> None:
        found[module] = found.get(module, False) or at_import

    def visit(node: ast.AST, at_import: bool) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                add(alias.name, at_import)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} uses a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                add(whole if whole in MODULES else str(node.module), at_import)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, at_import and not inside)

    visit(ast.parse(path.read_text(encoding="utf-8")), True)
    return found


IMPORTS = {name: imports(path, name) for name, path in MODULES.items()}


def tier(module: str) -> tuple[int, str]:
    """(number, entry) of a module in `TIERS`."""
    package, _, rest = module.partition(".")
    for number, entries in enumerate(TIERS[package]):
        for entry in entries:
            if rest == entry or (entry.endswith(".") and (rest + ".").startswith(entry)):
                return number, entry
    raise AssertionError(f"{module} is in no tier: give it a place in TIERS")


def edges() -> list[tuple[str, str, bool]]:
    return [
        (name, target, at_import)
        for name, targets in IMPORTS.items()
        for target, at_import in targets.items()
        if target in MODULES and target != name
    ]


def test_imports_point_down() -> None:
    wrong = []
    for name, target, at_import in edges():
        if name.split(".")[0] != target.split(".")[0]:
            continue
        if not at_import and (name, target) in UPWARD:
            continue
        (above, entry), (below, other) = tier(name), tier(target)
        if not (below < above or (entry == other and entry.endswith("."))):
            wrong.append(f"{name} (tier {above}) imports {target} (tier {below})")
    assert wrong == []


def test_every_exception_is_used_and_every_tier_exists() -> None:
    assert set(UPWARD) <= {(name, target) for name, target, _ in edges()}
    used = {(name.split(".")[0], tier(name)[1]) for name in MODULES}
    listed = {(package, entry) for package, tiers in TIERS.items() for entries in tiers for entry in entries}
    assert listed == used


def test_no_circles_at_import_time() -> None:
    graph: dict[str, set[str]] = {name: set() for name in MODULES}
    for name, target, at_import in edges():
        # A submodule's parent package is always there first; its __init__ must not need the submodule's importers.
        if at_import and not (name + ".").startswith(target + "."):
            graph[name].add(target)
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        for target in graph[name]:
            walk(target, (*path, name))
        done.add(name)

    for name in graph:
        walk(name, ())


def _importers(package: str) -> set[str]:
    return {
        name
        for name, targets in IMPORTS.items()
        if any(target == package or target.startswith(package + ".") for target in targets)
    }


def test_kernels_know_nothing_of_models_and_models_nothing_of_triton() -> None:
    assert _importers("transformers") == {"lcdd.models"}
    assert not {name for name in _importers("lcdd") if name.startswith("lcdd_kernels")}
    assert not {name for name in _importers("triton") if name.partition(".")[0] == "lcdd"}
    outside = {name for name in _importers("triton") if not name.startswith("lcdd_kernels.triton_kernels")}
    assert outside <= {"lcdd_kernels.aot"}
    library = {name for name, path in MODULES.items() if re.search(r"torch\.library\b", path.read_text("utf-8"))}
    assert {name for name in library if not name.startswith("lcdd_kernels.ops")} == set()
    assert _importers("datasets") == {"lcdd.data"}


def test_files_are_short() -> None:
    long = {
        str(path.relative_to(ROOT)): n for path in MODULES.values() if (n := len(path.read_text().splitlines())) > 480
    }
    assert long == {}


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_touches_no_gpu_no_triton_no_library() -> None:
    code = (
        "import sys, lcdd, lcdd_kernels, torch\n"
        "import lcdd.cli, lcdd.pipeline, lcdd.demo\n"
        "assert not torch.cuda.is_initialized()\n"
        "lazy = ('lcdd_kernels.triton_kernels.', 'lcdd_kernels.native')\n"
        "ours = [name for name in sys.modules if name.startswith(lazy)]\n"
        "assert not ours, ours\n"
        "maps = open('/proc/self/maps').read() if sys.platform == 'linux' else ''\n"
        "assert 'lcdd_native' not in maps\n"
    )
    run_python(code)
    run_python(
        "import sys, lcdd, lcdd_kernels\nassert 'triton' not in sys.modules and 'transformers' not in sys.modules"
    )


def test_help_imports_no_torch() -> None:
    code = (
        "import sys\nfrom lcdd.cli import main\n"
        "try:\n    main(['train', '--help'])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "assert 'torch' not in sys.modules and 'yaml' not in sys.modules\n"
    )
    assert "--gate_lr" in run_python(code)


def commands() -> set[str]:
    actions = [action for action in build_parser()._actions if action.dest == "command"]
    return set(actions[0].choices)


@pytest.mark.parametrize("command", sorted(commands()))
def test_every_command_answers_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"usage: lcdd {command}" in capsys.readouterr().out


def test_python_m_lcdd_is_lcdd() -> None:
    for argv in ([sys.executable, "-m", "lcdd", "--help"], [str(Path(sys.executable).parent / "lcdd"), "--help"]):
        if not Path(argv[0]).exists():
            pytest.skip("the `lcdd` script is not installed in this environment (pip install -e . makes it)")
        result = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0
        assert "usage: lcdd" in result.stdout


def test_documented_commands_exist_and_existing_ones_are_documented() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", readme, flags=re.DOTALL))
    named = set(re.findall(r"(?:^|[\s`])lcdd ([a-z]+)\b", blocks))
    assert named == commands()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert set(re.findall(r"(?:^|[\s`])make ([a-z]+)\b", blocks)) <= targets
    flags = set(re.findall(r"(?<![\w-])--([a-z][a-z_]+)", blocks))
    subparsers = next(action for action in build_parser()._actions if action.dest == "command").choices
    known = {option.removeprefix("--") for sub in subparsers.values() for option in sub._option_string_actions}
    assert flags <= known | {"version"}
