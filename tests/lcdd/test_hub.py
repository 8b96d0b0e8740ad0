"""Carriers and triggers on the hub: what is uploaded, its card, and that what comes back is the same and checked.

No network: the hub's client is replaced by a directory.
"""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from lcdd.carrier import Carrier
from lcdd.checkpoint import hub
from lcdd.eraser import Trigger
from lcdd.errors import InputError


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub in a directory, `user/name` -> its files."""
    place = tmp_path / "hub"

    class Api:
        def __init__(self, token=None):
            assert token in (None, "secret")

        def create_repo(self, repo_id, private, exist_ok):
            assert exist_ok
            (place / repo_id).mkdir(parents=True, exist_ok=True)

        def upload_folder(self, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, place / repo_id, dirs_exist_ok=True)
            return SimpleNamespace(commit_url=f"hub:{repo_id}: {commit_message}")

    def download(repo_id, revision, allow_patterns):
        if not (place / repo_id).is_dir():
            raise ConnectionError("404: no such repository")
        copy = tmp_path / "cache" / repo_id / (revision or "main")
        for path in (place / repo_id).iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                copy.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, copy)
        return str(copy)

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "snapshot_download", download)
    return place


@pytest.fixture
def parts(make_models, make_carrier):
    base, tuned = make_models()
    return base, make_carrier(base, tuned), Trigger.random_tokens(base, 3, seed=0)


def test_a_carrier_comes_back_from_the_hub_as_it_was(store, parts):
    base, carrier, _ = parts
    address = carrier.push_to_hub("user/carrier", base_model="org/base", results="| a | b |", token="secret")
    assert address == "hub:user/carrier: Upload carrier"
    again = Carrier.from_pretrained("user/carrier", revision="v1")
    assert all(torch.equal(again.deltas[name], delta) for name, delta in carrier.deltas.items())
    assert torch.equal(again.gate, carrier.gate)
    again.check_base(base)


def test_the_card_says_what_it_is_of_and_how_to_use_it(store, parts):
    _, carrier, trigger = parts
    carrier.push_to_hub("user/carrier", base_model="org/base", results="| a | b |")
    trigger.push_to_hub("user/trigger", base_model="org/base")
    for name, one, tag in (("carrier", carrier, "lcdd-carrier"), ("trigger", trigger, "sft-eraser")):
        text = (store / "user" / name / "README.md").read_text(encoding="utf-8")
        metadata = yaml.safe_load(text.split("---")[1])
        assert metadata["base_model"] == "org/base"
        assert {"lcdd", tag} <= set(metadata["tags"])
        assert f'from_pretrained("user/{name}")' in text
        code = text.split("```python\n")[1].split("```")[0]
        compile(code, "card", "exec")
        assert 'load_model("org/base")' in code
        assert type(one).__name__ in code
    card = (store / "user" / "carrier" / "README.md").read_text(encoding="utf-8")
    assert f"| open gates | {carrier.n_open:,} of {carrier.layout.n_gates:,} |" in card
    assert carrier.base_fingerprint in card
    assert "## What was measured\n\n| a | b |" in card


def test_a_path_of_this_machine_is_not_told_to_the_world(store, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my" / "base").mkdir(parents=True)
    _, carrier, _ = parts
    for base in (str(tmp_path / "my" / "base"), "my/base"):
        carrier.push_to_hub("user/carrier", base_model=base)
        text = (store / "user" / "carrier" / "README.md").read_text(encoding="utf-8")
        assert base not in text
        assert "base_model" not in yaml.safe_load(text.split("---")[1])


def test_what_comes_from_the_hub_is_checked_like_what_is_on_the_disk(store, parts):
    _, carrier, trigger = parts
    carrier.push_to_hub("user/carrier")
    trigger.push_to_hub("user/trigger")
    assert torch.equal(Trigger.from_pretrained("user/trigger").embeds, trigger.embeds)
    for name in ("carrier/carrier.safetensors", "trigger/adapter_model.safetensors"):
        path = store / "user" / name
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    with pytest.raises(InputError, match="is damaged"):
        Carrier.from_pretrained("user/carrier")
    with pytest.raises(InputError, match="is damaged"):
        Trigger.from_pretrained("user/trigger")


def test_nothing_but_tensors_and_json_is_fetched(store, parts, tmp_path):
    _, carrier, _ = parts
    carrier.push_to_hub("user/carrier")
    (store / "user" / "carrier" / "run_me.py").write_text("raise SystemExit")
    Carrier.from_pretrained("user/carrier")
    assert {path.suffix for path in (tmp_path / "cache" / "user" / "carrier" / "main").iterdir()} == {
        ".json", ".safetensors",
    }  # fmt: skip


def test_names_that_are_not_there_are_named_and_paths_are_not_asked_of_the_hub(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="carrier: expected a directory or a hub name, got 'user/none': 404"):
        Carrier.from_pretrained("user/none")
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    for name in ("runs/typo", "typo", str(tmp_path / "no"), "a/b/c"):
        with pytest.raises(InputError, match="carrier: expected a directory"):
            Carrier.from_pretrained(name)
        with pytest.raises(InputError, match=r"trigger: expected adapter_config\.json"):
            Trigger.from_pretrained(name)
