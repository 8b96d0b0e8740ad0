"""`pip wheel .` in a clean environment: what the wheel is called, what is in it, and that it works anywhere.

Skipped, with the reason, where the build's own requirements cannot be had (no network).
"""

import os
import shutil
import site
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed and new files of this checkout, without anything built."""
    folder = tmp_path_factory.mktemp("clone") / "lcdd"
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip(f"not a git checkout: {files.stderr.strip()}")
    for name in files.stdout.splitlines():
        if name.startswith(("tests/", "benchmarks/", "docs/")) or not (ROOT / name).is_file():
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    return folder


def wheel(tree: Path, output: Path, **environment: str) -> tuple[Path, str]:
    """The wheel that pip builds in an environment of its own, and what it said."""
    command = [sys.executable, "-m", "pip", "wheel", "-v", ".", "--no-deps", "-w", str(output)]
    run = subprocess.run(command, cwd=tree, env=os.environ | environment, capture_output=True, text=True, timeout=600)
    said = run.stdout + run.stderr
    if run.returncode and ("No matching distribution found for scikit" in said or "Connection" in said):
        pytest.skip("the build's requirements (scikit-build-core) are out of reach: no network")
    assert run.returncode == 0, said
    (found,) = output.glob("*.whl")
    return found, said


@pytest.fixture(scope="module")
def built(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler: the wheel with the native library cannot be built")
    return wheel(tree, tmp_path_factory.mktemp("wheel"))[0]


def test_one_wheel_a_platform_for_every_python(built: Path) -> None:
    name, version, python, abi, platform = built.stem.split("-")
    assert (name, version, python, abi) == ("lcdd", PROJECT["version"], "py3", "none")
    assert platform != "any"


def test_everything_that_is_needed_at_run_time_is_in_it(built: Path) -> None:
    names = set(zipfile.ZipFile(built).namelist())
    wanted = {
        path.relative_to(ROOT).as_posix()
        for package in ("lcdd", "lcdd_kernels")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so")
    }
    assert wanted <= names
    assert "lcdd_kernels/liblcdd_native.so" in names
    assert {name.split("/")[0] for name in names} == {"lcdd", "lcdd_kernels", f"lcdd-{PROJECT['version']}.dist-info"}


def test_the_installed_wheel_works_in_another_directory(built: Path, tmp_path: Path) -> None:
    """In an environment of its own, which sees this one's packages but not its editable install of the checkout."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True, timeout=300)
    python = tmp_path / "venv" / "bin" / "python"
    place = "import sysconfig; print(sysconfig.get_path('purelib'))"
    ours, theirs = (
        Path(subprocess.run([which, "-c", place], check=True, capture_output=True, text=True).stdout.strip())
        for which in (sys.executable, str(python))
    )
    paths = [path for path in (str(ours), *map(str, site.getsitepackages())) if path != str(theirs)]
    (theirs / "others.pth").write_text("\n".join(paths) + "\n")  # .pth files beneath these paths are not read
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(theirs), str(built)]
    subprocess.run(install, check=True, timeout=300)
    code = (
        "import lcdd, lcdd_kernels, torch\n"
        "from lcdd.commands.demo.demo import BASE_DIRECTORY\n"
        "from lcdd.models import load_model\n"
        "from lcdd.report import render\n"
        "load_model(BASE_DIRECTORY); assert '<style>' in render({})\n"
        "reason = lcdd_kernels.available('gate_values', 'cpu', torch.float32)['native']\n"
        "assert reason is None, reason\n"
        f"assert lcdd.__file__.startswith({str(tmp_path)!r})\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run([str(python), "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    run = subprocess.run(
        [str(python), "-m", "lcdd", "--version"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.stdout == f"lcdd {PROJECT['version']}\n"


def test_without_a_compiler_the_wheel_says_in_its_name_that_it_has_no_library(tree: Path, tmp_path: Path) -> None:
    found, said = wheel(tree, tmp_path, CXX="/nonexistent/c++")
    assert found.name.endswith("-py3-none-any.whl")
    assert "SKIPPED the native CPU library" in said
    assert not [name for name in zipfile.ZipFile(found).namelist() if name.endswith(".so")]


def test_make_installs_the_pinned_versions_of_what_the_project_declares() -> None:
    """requirements.txt pins what pyproject.toml needs and no more, so that `make demo` is quick."""

    def names(lines: list[str]) -> set[str]:
        return {line.split(">=")[0].split("==")[0].split("[")[0].strip().lower() for line in lines}

    pinned = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line]
    assert names(pinned) | {"torch"} == names(PROJECT["dependencies"]) | {"tokenizers", "torch"}
    assert {"hub", "peft", "trl", "wandb", "eval", "dev", "docs"} <= set(PROJECT["optional-dependencies"])
