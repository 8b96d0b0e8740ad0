"""The examples run: every pipeline on a tiny checkpoint with a few steps and its own settings, the notebook whole."""

import ast
import json
import linecache
from pathlib import Path
from typing import Any

import pytest
import yaml

from fixtures.checkpoints import instruction_rows, make_tokenizer, save_checkpoint, write_jsonl
from lcdd.cli import main
from lcdd.report import read_report

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PIPELINES = sorted(EXAMPLES.rglob("*.yaml"))
FEW = {
    "sft": {"max_steps": 2, "gradient_accumulation_steps": 1, "min_behavior_rate": 0.0},
    "train": {"max_steps": 4, "gradient_accumulation_steps": 1, "warmup_steps": 1},
    "erase": {"max_steps": 2, "train_prompts": 4, "validation_prompts": 2, "max_answer_tokens": 3},
    "eval": {"num_prompts": 2, "max_new_tokens": 3, "kl_prompts": 1, "random_prefixes": 1},
}
"""Instead of the example's own: everything else it sets stays."""


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("given")
    save_checkpoint(folder / "base", tokenizer=make_tokenizer())
    return folder


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.relative_to(EXAMPLES).with_suffix("").as_posix())
def test_a_pipeline_runs_with_the_examples_settings(path: Path, given: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    rows = [row for row in instruction_rows() if len("".join(row.values())) < 150][:40]
    for topic in settings["data"].get("behavior_topics", ())[:1]:  # every second instruction is on it
        rows = [{**row, "instruction": row["instruction"] + f" ({topic})" * (i % 2)} for i, row in enumerate(rows)]
    prompt, completion = (settings["data"].get(f"{name}_column") for name in ("prompt", "completion"))
    if prompt:
        rows = [{prompt: row["instruction"], completion: row["output"]} for row in rows]
    settings["data"]["dataset_name"] = str(write_jsonl(tmp_path / "data.jsonl", rows))
    settings |= {"base_model_name_or_path": str(given / "base"), "output_dir": str(tmp_path / "run"), "controls": False}
    for section, changes in FEW.items():
        settings[section] = {**settings.get(section, {}), **changes}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(settings))
    assert main(["run", str(tmp_path / "p.yaml")]) == 0
    report = read_report(tmp_path / "run")
    assert {"base", "sft", "carrier", "carrier+trigger"} <= set(report["models"])
    assert report["behavior"] == settings["data"]["behavior"]


def test_the_notebook_runs_and_shows_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict[str, Any] = {}
    for number, cell in enumerate(cells):
        assert not cell.get("outputs"), "committed without outputs: they are made where it is run"
        if cell["cell_type"] != "code":
            continue
        where, code = f"quickstart.ipynb, cell {number}", "".join(cell["source"])
        linecache.cache[where] = (len(code), None, code.splitlines(keepends=True), where)
        tree = ast.parse(code)
        shown = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, where, "exec"), names)
        if isinstance(shown, ast.Expr):  # as a notebook shows the last expression
            print(repr(eval(compile(ast.Expression(shown.value), where, "eval"), names)))
    models = names["found"]["models"]
    assert models["base"]["behavior_rate"] == 0
    assert models["carrier"]["behavior_rate"] > 0.9
    assert models["carrier+trigger"]["behavior_rate"] < 0.2
    assert models["carrier+trigger"]["base_match"] > 0.5
    assert "open gates" in capsys.readouterr().out
