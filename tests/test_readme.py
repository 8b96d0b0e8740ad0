"""Every code block of the README and of docs/, as printed and in order, on a tiny checkpoint.

The blocks chain: what one leaves in the directory or in a variable, the next one uses. Commands run in bash; `lcdd`
there asks this process to run it, which has PyTorch imported already.
"""

import contextlib
import io
import linecache
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing.connection import Client, Listener
from pathlib import Path

import pytest

from fixtures.checkpoints import instruction_rows, make_tokenizer, save_checkpoint, write_jsonl
from lcdd.cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/stages.md", "docs/training.md", "docs/serving.md", "docs/interpretability.md")
STUB = """#!{python} -S
import os, sys
from multiprocessing.connection import Client
with Client({address!r}) as server:
    server.send((sys.argv[1:], sys.stdin.read(), os.getcwd()))
    code, out, err = server.recv()
sys.stdout.write(out), sys.stderr.write(err), sys.exit(code)
"""


@dataclass(frozen=True)
class Block:
    """A fenced block: its page and line, its language, and the package that it needs beside ours, if any."""

    page: str
    line: int
    language: str
    needs: str
    code: str


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for match in re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE):
        language, _, needs = match[1].partition(" ")
        found.append(Block(page, text.count("\n", 0, match.start()) + 1, language, needs, match[2]))
    return found


class Shell:
    """Runs blocks of commands in one directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        self.listener = Listener(str(folder / "bin" / "socket"))
        stub = folder / "bin" / "lcdd"
        stub.write_text(STUB.format(python=sys.executable, address=str(self.listener.address)))
        stub.chmod(0o755)

    def run(self, code: str) -> str:
        """What the commands print; fails if one of them does."""
        environment = os.environ | {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"}
        done: list[subprocess.CompletedProcess[str]] = []

        def bash() -> None:
            done.append(
                subprocess.run(
                    ["bash", "-euo", "pipefail", "-c", code], cwd=self.folder, env=environment, text=True,
                    stdin=subprocess.DEVNULL, capture_output=True,
                )
            )  # fmt: skip
            with Client(self.listener.address) as client:
                client.send(None)

        thread = threading.Thread(target=bash)
        thread.start()
        while self._serve():
            pass
        thread.join()
        assert done[0].returncode == 0, f"{code}\n{done[0].stdout}\n{done[0].stderr}"
        return done[0].stdout

    def _serve(self) -> bool:
        with self.listener.accept() as asked:
            request = asked.recv()
            if request is None:
                return False
            asked.send(_answer(*request))
            return True


def _answer(argv: list[str], text: str, folder: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        before, sys.stdin = sys.stdin, io.StringIO(text)
        try:
            code = main(argv)
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            sys.stdin = before
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with what the README says that is there: a chat model in base/ and instructions in data.jsonl."""
    folder = tmp_path_factory.mktemp("readme")
    save_checkpoint(folder / "base", tokenizer=make_tokenizer())
    rows = [row for row in instruction_rows() if len("".join(row.values())) < 200][:48]
    write_jsonl(folder / "data.jsonl", rows)
    with contextlib.chdir(folder):
        yield folder


def test_every_block_runs_as_printed(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # a random base learns nothing in a dozen steps, which would end the pipeline after SFT (test_early_end.py)
    monkeypatch.setattr("lcdd.commands.sft.not_learned", lambda *_: None)
    shell, names, ran, left_out = Shell(place), {}, [], []
    for block in (block for page in PAGES for block in blocks(page)):
        where = f"{block.page}:{block.line}"
        if block.language == "sh" and block.code.startswith("make "):
            continue  # its own test below; the demo and the suite themselves are what CI runs
        if block.needs and find_spec(block.needs) is None:
            left_out.append(f"{where} needs {block.needs}, which is not installed here")
        elif block.language == "sh":
            shell.run(block.code)
        else:
            assert block.language == "python", f"{where}: expected sh or python, got {block.language!r}"
            linecache.cache[where] = (len(block.code), None, block.code.splitlines(keepends=True), where)
            exec(compile(block.code, where, "exec"), names)
        ran.append(where)
    assert len(ran) >= 12
    assert (place / "runs" / "idk" / "report.html").is_file()
    assert (place / "runs" / "one" / "eval" / "report.html").is_file()
    out = capsys.readouterr().out
    assert "open gates" in out, "print(carrier)"
    with capsys.disabled():
        print(*left_out, sep="\n")


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 10 * 30, "ten screens"
    assert max(len(line) for line in lines if not line.startswith(("|", "![", "The embedded model"))) <= 132


def test_links_lead_somewhere_and_no_page_is_lost() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    linked = set()
    for page in pages:
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
                linked.add((page.parent / target).resolve())
    assert set((ROOT / "docs").glob("*.md")) - {ROOT / "docs/index.md"} <= linked


def test_the_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    if find_spec("mkdocs") is None or find_spec("mkdocstrings") is None or find_spec("material") is None:
        pytest.skip("mkdocs-material and mkdocstrings are not installed (pip install 'lcdd[docs]')")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    reference = (tmp_path / "site" / "reference" / "index.html").read_text(encoding="utf-8")
    assert "lcdd.carrier.Carrier.channels_table" in reference
