"""Which way imports point, what importing does not do, and that every documented command is there.

`ORDER` is the whole rule, without exceptions.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lcdd.cli import build_parser, main

ROOT = Path(__file__).resolve().parents[1]

# Lowest first: a room imports rooms further left alone. Inside a room anything goes but circles.
ORDER = {
    "lcdd_kernels": [
        ("assembly", "checks", "reference"),
        ("registry",),
        ("cases", "native", "triton_kernels"),
        ("testing", "cuda"),
        ("backends",),
        ("ops",),
        ("functional",),
        ("aot",),
        ("report_card",),
    ],
    "lcdd": [
        ("errors",),
        ("config", "models"),
        ("data", "checkpoint"),
        ("carrier", "report"),
        ("optimizer",),
        ("trainer", "eraser"),
        ("evaluate",),
        ("integrations", "commands"),
        ("cli",),
        ("__main__",),
    ],
}
RANK = {
    f"{package}.{room}": rank for package, order in ORDER.items() for rank, rooms in enumerate(order) for room in rooms
}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ORDER
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


def room(module: str) -> str:
    """package.room; the package's own facade is no room."""
    return ".".join(module.split(".")[:2])


def edges() -> list[tuple[str, str, bool]]:
    return [
        (name, target, at_import)
        for name, targets in IMPORTS.items()
        for target, at_import in targets.items()
        if target in MODULES and target != name
    ]


def test_imports_point_down() -> None:
    wrong = [
        f"{name} imports {target}"
        for name, target, _ in edges()
        if name.split(".")[0] == target.split(".")[0] and "." in name and "." in target
        if room(name) != room(target) and RANK[room(target)] >= RANK[room(name)]
    ]
    assert wrong == []


def test_every_room_has_its_place() -> None:
    assert {room(name) for name in MODULES if "." in name} == set(RANK)
    entries = {path.stem for path in (ROOT / "lcdd").iterdir() if not path.name.startswith("__")} - {"py"}
    assert len(entries) <= 14, entries


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
    assert {room(name) for name in _importers("transformers")} == {"lcdd.models", "lcdd.integrations"}
    assert not {name for name in _importers("lcdd") if name.startswith("lcdd_kernels")}
    assert not {name for name in _importers("triton") if name.partition(".")[0] == "lcdd"}
    outside = {name for name in _importers("triton") if not name.startswith("lcdd_kernels.triton_kernels")}
    assert outside <= {"lcdd_kernels.aot"}
    library = {name for name, path in MODULES.items() if re.search(r"torch\.library\b", path.read_text("utf-8"))}
    assert {name for name in library if not name.startswith("lcdd_kernels.ops")} == set()
    assert {room(name) for name in _importers("datasets")} == {"lcdd.data"}


def test_tests_and_benchmarks_share_fixtures_and_nothing_else() -> None:
    """Only what tests the benchmarks imports them; what both need is in `fixtures`, which knows neither."""

    def imported(folder: str, *, but: str = "\0") -> set[str]:
        found: set[str] = set()
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not str(path.relative_to(ROOT)).startswith(but):
                found |= {module.split(".")[0] for module in imports(path, str(path))}
        return found

    test_modules = {path.stem for path in (ROOT / "tests").rglob("*.py")} | {"tests"}
    assert "benchmarks" not in imported("tests", but="tests/benchmarks") | imported("fixtures")
    assert not test_modules & (imported("benchmarks") | imported("fixtures"))


def test_files_are_short() -> None:
    long = {
        str(path.relative_to(ROOT)): n
        for path in MODULES.values()
        if (n := len(path.read_text("utf-8").splitlines())) > 600
    }
    assert long == {}


def _body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function's body; signature and docstring do not count."""
    body = function.body[1:] if ast.get_docstring(function) and len(function.body) > 1 else function.body
    return (function.end_lineno or 0) - body[0].lineno + 1


def test_functions_are_short() -> None:
    long = {}
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                kernel = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
                if (lines := _body_lines(node)) > (100 if kernel else 60):
                    long[f"{name}.{node.name}"] = lines
    assert long == {}


def test_the_public_names_are_there_and_load_no_torch_before_use() -> None:
    run_python(
        "import sys, lcdd\n"
        "assert 'torch' not in sys.modules\n"
        "from lcdd import LCDDConfig\n"
        "assert 'torch' not in sys.modules\n"
        "for name in lcdd.__all__: assert getattr(lcdd, name) is not None, name\n"
        "from lcdd import evaluate\n"
        "assert callable(evaluate)\n"
    )


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_touches_no_gpu_no_triton_no_library() -> None:
    code = (
        "import sys, lcdd, lcdd_kernels, torch\n"
        "import lcdd.cli, lcdd.commands.run, lcdd.commands.demo.demo\n"
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


def test_generate_and_chat_import_nothing_of_training_and_evaluation() -> None:
    run_python(
        "import sys, lcdd.commands.generate, lcdd.commands.chat\n"
        "ours = {'lcdd.trainer', 'lcdd.evaluate', 'lcdd.integrations', 'lcdd.commands.reporting'}\n"
        "theirs = {'datasets', 'peft', 'trl', 'tensorboard', 'wandb', 'pandas', 'pyarrow', 'lm_eval', 'scipy'}\n"
        "found = (ours | theirs) & set(sys.modules)\n"
        "assert not found, found\n"
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
    named = set(re.findall(r"(?:^|(?<!from)[\s`])lcdd ([a-z]+)\b", blocks))
    assert named == commands()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert set(re.findall(r"(?:^|[\s`])make ([a-z]+)\b", blocks)) <= targets
    ours = re.sub(r"python -m benchmarks[^`\n]*", "", blocks)  # benchmarks have flags of their own
    flags = set(re.findall(r"(?<![\w-])--([a-z][a-z_]+)", ours))
    subparsers = next(action for action in build_parser()._actions if action.dest == "command").choices
    known = {option.removeprefix("--") for sub in subparsers.values() for option in sub._option_string_actions}
    assert flags <= known | {"version"}
