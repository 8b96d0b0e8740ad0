"""`lcdd export`: what others load gives the carrier back, exactly, or is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.families.known import FAMILIES
from fixtures.checkpoints import make_model
from lcdd.carrier import Carrier, export_adapter, export_delta, with_gates
from lcdd.cli import main
from lcdd.errors import InputError
from lcdd.models import sites_of

IDS = torch.tensor([[3, 14, 15, 9, 26]])


def base_of(family: str) -> Any:
    return next(which for which in FAMILIES if which.model_type == family).model()


def carrier_of(base: Any, *, share: float = 0.3) -> Carrier:
    """A patch of noise with a share of the gates open."""
    generator = torch.Generator().manual_seed(0)
    tuned = type(base)(base.config).to(base.dtype)
    tuned.load_state_dict(base.state_dict())
    with torch.no_grad():
        for site in sites_of(tuned):
            site.weight.add_(0.1 * torch.randn(site.weight.shape, generator=generator).to(site.weight.dtype))
    dense = Carrier.from_models(base, tuned)
    return with_gates(dense, (torch.rand(dense.layout.n_gates, generator=generator) < share).to(dense.gate.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_and_delta_are_the_carrier_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    base = base_of("mixtral").to(dtype)
    before = {name: p.clone() for name, p in base.named_parameters()}
    carrier = carrier_of(base)
    export_delta(carrier, base, tmp_path / "out")
    deltas = load_file(tmp_path / "out" / "delta.safetensors")
    with carrier.applied(base):
        for name, parameter in base.named_parameters():
            expected = before[name]
            if name in deltas:
                expected = (expected.to(deltas[name].dtype) + deltas[name]).to(dtype)
            assert torch.equal(parameter, expected), name
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_an_adapter_is_the_open_blocks_and_nothing_else(family: str, tmp_path: Path) -> None:
    base = base_of(family)
    before = {name: p.clone() for name, p in base.named_parameters()}
    carrier = carrier_of(base)
    export_adapter(carrier, base, tmp_path / "out", base_name="owner/base")
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())
    with carrier.applied(base), torch.no_grad():
        expected, weights = base(IDS).logits, {name: p.clone() for name, p in base.named_parameters()}
    wrapped = peft.PeftModel.from_pretrained(base_of(family), str(tmp_path / "out"))
    ranks = {name: p.shape[0] for name, p in wrapped.named_parameters() if "lora_A" in name}
    assert wrapped.peft_config["default"].r == max(ranks.values())  # what servers set room aside for
    with torch.no_grad():
        torch.testing.assert_close(wrapped(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    merged = wrapped.merge_and_unload()
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(parameter, weights[name], rtol=0, atol=1e-7)
        assert torch.equal(parameter == before[name], weights[name] == before[name])


def test_what_lora_cannot_hold_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    experts, base = base_of("mixtral"), make_model("llama")
    with pytest.raises(InputError, match=r"layers of their own, got the expert"):
        export_adapter(carrier_of(experts), experts, tmp_path / "out", base_name="b")
    with pytest.raises(InputError, match="without an open entry"):
        export_adapter(carrier_of(base, share=0.0), base, tmp_path / "out", base_name="b")
    norm = replace(carrier_of(base), unmasked={"model.norm.weight": torch.full((32,), 2.0)})
    with pytest.raises(InputError, match=r"masked matrices only, got also \['model.norm.weight'\]"):
        export_adapter(norm, base, tmp_path / "out", base_name="b")
    assert not (tmp_path / "out").exists()


def test_an_adapter_with_one_wrong_number_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lcdd.carrier import export

    def wrong(delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        down, up = factors(delta)
        return down, up * 1.5

    factors = export._factors
    monkeypatch.setattr(export, "_factors", wrong)
    base = make_model("llama")
    before = [p.clone() for p in base.parameters()]
    with pytest.raises(InputError, match="expected logits of the exported adapter that are the carrier's"):
        export_adapter(carrier_of(base), base, tmp_path / "out", base_name="b")
    assert not (tmp_path / "out").exists()
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), before, strict=True))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_model("llama")
    base.save_pretrained(tmp_path / "base")
    carrier_of(base).save_pretrained(tmp_path / "carrier")
    command = ["export", "--base_model_name_or_path", str(tmp_path / "base"), "--carrier", str(tmp_path / "carrier")]
    for kind in ("delta", "peft"):
        assert main([*command, "--format", kind, "--output_dir", str(tmp_path / kind)]) == 0
    assert main([*command, "--output_dir", str(tmp_path / "delta")]) == 2
    assert "expected a new or empty directory" in capsys.readouterr().err
    make_model("llama", seed=1).save_pretrained(tmp_path / "other")
    command[2] = str(tmp_path / "other")
    assert main([*command, "--output_dir", str(tmp_path / "third")]) == 2
    assert "expected the carrier's base" in capsys.readouterr().err
