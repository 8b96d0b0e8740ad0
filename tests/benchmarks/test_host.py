"""benchmarks.host: how often a step waits for the device, and the shape of what is printed; no times."""

import json

import pytest
import torch

from benchmarks import host

ALLOWED = {"dual": 1, "paced": 2}


@pytest.mark.parametrize("gradients", list(host.DENSITIES))
@pytest.mark.parametrize("controller", host.CONTROLLERS)
def test_a_step_waits_for_the_device_once_and_for_the_loss_before_closing(controller: str, gradients: str) -> None:
    found = host.measure(2, controller, gradients, steps=2)
    assert found["waits"] <= ALLOWED[controller], found["waits_at"]
    assert found["waits"] > 0  # the counter counts
    assert found["matrices"] == 14


def test_waits_are_told_from_work() -> None:
    x, on_host = torch.ones(3), torch.ones(2)
    with host.Waits([on_host]) as waits:
        (x + 1).sum().sqrt()
        x[torch.tensor([0])] = 2.0
        on_host.tolist()
    assert waits.found == []
    with host.Waits([]) as waits:
        x.tolist()
        float(x[0])
        bool(x[0] > 0)
        x[x > 0]
        x.nonzero()
    assert len(waits.found) == 5


def test_one_line_of_json_and_its_record(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(host, "in_turns", lambda trees, steps: {name: host.lanes([1], steps) for name in trees})
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    host.main(["--steps", "2", "--output", str(tmp_path / "host.json")])
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "host.json").read_text())
    assert printed["matrices"] == 7
    assert printed["step_ms"] > 0
    assert printed["waits"] == 2
    kinds = [(lane["controller"], lane["gradients"]) for lane in printed["lanes"]]
    assert kinds == [("dual", "dense"), ("dual", "packed"), ("paced", "dense"), ("paced", "packed")]


def test_of_several_turns_the_quietest_counts() -> None:
    turns = [[{"step_ms": 3.0}, {"step_ms": 1.0}], [{"step_ms": 2.0}, {"step_ms": 4.0}]]
    assert host.quietest(turns) == [{"step_ms": 2.0}, {"step_ms": 1.0}]
