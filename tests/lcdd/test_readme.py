"""The README's first snippet runs as it is printed."""

import re
from pathlib import Path

import torch
from helpers import save_checkpoint
from transformers import AutoModelForCausalLM

from lcdd.carrier import Carrier

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_first_python_snippet_runs_as_printed(tmp_path, monkeypatch):
    snippet = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)[0]
    for seed, name in enumerate(("base", "sft")):
        save_checkpoint(tmp_path / "path" / "to" / name, seed=seed)
    monkeypatch.chdir(tmp_path)
    ids = torch.randint(3, 200, (2, 8), generator=torch.Generator().manual_seed(0))
    exec(compile(snippet, "README.md", "exec"), {"batches": [{"input_ids": ids, "labels": ids}] * 3})
    carrier = Carrier.from_pretrained(tmp_path / "carrier")
    assert 0 < carrier.n_open <= carrier.layout.n_gates
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert folded(ids).logits.isfinite().all()
