"""The carrier as a patch: exact application, exact reversion, files that notice damage."""

import copy
import json

import pytest
import torch

from lcdd.carrier import MANIFEST, WEIGHTS, Carrier, with_gates
from lcdd.checkpoint import model_fingerprint, write_manifest
from lcdd.config import LCDDConfig
from lcdd.errors import WrongFingerprint
from lcdd.models import GROUPS, decoder_layers, head_weight, sites_of

IDS = torch.arange(3, 23).view(2, 10)


def bits(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(one, other):
    return all(torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)) for name in one)


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "mistral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_apply_then_revert_gives_every_byte_of_the_base_back(make_models, make_carrier, architecture, dtype):
    base, tuned = make_models(architecture, dtype)
    carrier, before = make_carrier(base, tuned), bits(base)
    with torch.no_grad():
        expected = base(IDS).logits
    with carrier.applied(base):
        assert not same(bits(base), before)
        assert torch.equal(sites_of(base)[6].weight, w_eff_down(before, tuned, carrier, base))
    assert same(bits(base), before)
    with torch.no_grad():
        assert torch.equal(base(IDS).logits, expected)


def w_eff_down(before, tuned, carrier, model):
    """The first layer's down projection, worked out densely."""
    site, layout, gate = sites_of(model)[6], carrier.layout, carrier.gate
    fixed = before[f"{site.name}.weight"]
    delta = (sites_of(tuned)[6].weight.detach().float() - fixed.float()).to(fixed.dtype).float()
    row, col = gate[layout.slice(0, "ffn_write")], gate[layout.slice(0, "ffn_hidden")]
    product = row[:, None] * col
    return torch.where(product == 0, fixed, (fixed.float() + product * delta).to(fixed.dtype))


def test_a_grouped_query_column_gate_opens_its_channel_for_every_query_head_it_serves(make_models, make_carrier):
    base, tuned = make_models()
    carrier, before = make_carrier(base, tuned, density=0.5), bits(base)
    site = next(s for s in sites_of(base) if s.kind == "o")
    with carrier.applied(base):
        moved = (site.weight != before[f"{site.name}.weight"]).any(0).view(2, 2, 8)  # kv head, copy, channel
    gate = carrier.gate[carrier.layout.slice(0, "attn_v")].view(2, 8)
    assert torch.equal(moved[:, 0], gate != 0)
    assert torch.equal(moved[:, 1], gate != 0)


def test_all_gates_closed_leaves_the_base_and_all_open_gives_the_other_model(make_models, make_carrier):
    base, tuned = make_models()
    before = bits(base)
    closed = make_carrier(base, tuned, density=0.0)
    with closed.applied(base):
        assert same(bits(base), before)
    dense = Carrier.from_models(base, tuned)
    with dense.applied(base):
        for name, value in bits(tuned).items():
            torch.testing.assert_close(base.get_parameter(name), value, rtol=2e-7, atol=2e-7)
    assert closed.delta_norm() == 0
    assert closed.sparsity()["overall"] == 1
    assert dense.sparsity()["overall"] == 0


def test_delta_norm_is_the_distance_of_the_patched_weights(make_models, make_carrier):
    base, tuned = make_models(dtype=torch.float64)
    carrier, before = make_carrier(base, tuned), bits(base)
    with carrier.applied(base):
        squared = sum(float((base.get_parameter(n).detach() - v).square().sum()) for n, v in before.items())
    assert carrier.delta_norm() == pytest.approx(squared**0.5, rel=1e-9)
    assert carrier.scaled(0.25).delta_norm() == pytest.approx(carrier.delta_norm() / 4, rel=1e-6)


def test_unmasked_parameters_are_kept_exactly_and_put_back(make_models):
    base, tuned = make_models(dtype=torch.bfloat16)
    norm = decoder_layers(tuned)[0].input_layernorm.weight
    with torch.no_grad():
        norm += 0.1
        head_weight(tuned)[3] *= 2
    patch, before = Carrier.from_models(base, tuned), bits(base)
    assert set(patch.unmasked) == {"model.layers.0.input_layernorm.weight", "lm_head.weight"}
    with patch.applied(base):
        assert torch.equal(decoder_layers(base)[0].input_layernorm.weight, norm)
        assert torch.equal(head_weight(base), head_weight(tuned))
    assert same(bits(base), before)
    with pytest.raises(ValueError, match="scaled: expected a patch of masked matrices only"):
        patch.scaled(2.0)


def test_tied_embeddings_are_patched_once_and_put_back(make_models):
    base, tuned = make_models(tied=True)
    with torch.no_grad():
        tuned.get_input_embeddings().weight[5] += 1
    patch, before = Carrier.from_models(base, tuned), bits(base)
    assert list(patch.unmasked) == ["model.embed_tokens.weight"]
    with patch.applied(base):
        assert torch.equal(head_weight(base), head_weight(tuned))
    assert same(bits(base), before)


def trained(base, tuned, **changes):
    from lcdd.optimizer import LCDDOptimizer

    settings = {"learning_rate": 1e-3, "warmup_steps": 2, "gate_init_mean": 0.0, "gate_init_std": 2.0, "pack": "never"}
    model = copy.deepcopy(tuned).train()
    optimizer = LCDDOptimizer.attach(model, base, LCDDConfig(**settings | changes), total_steps=6)
    for _ in range(6):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step(loss.detach())
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("kind", ["hard_concrete", "heaviside_ste"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_patch_has_the_trained_models_bits(make_models, kind, dtype):
    base, tuned = make_models(dtype=dtype)
    _, optimizer = trained(base, tuned, gate_kind=kind)
    carrier = optimizer.carrier()
    folded = optimizer.fold()
    assert 0 < carrier.n_open < carrier.layout.n_gates
    with carrier.applied(base):
        assert same(bits(base), bits(folded))
    assert same(bits(carrier.fold(copy.deepcopy(base))), bits(folded))


def test_a_carrier_with_trained_norms_takes_them_along(make_models):
    base, tuned = make_models()
    _, optimizer = trained(base, tuned, train_unmasked=True)
    carrier = optimizer.carrier()
    assert "model.norm.weight" in carrier.unmasked
    assert carrier.unmasked_norm > 0
    before, folded = bits(base), optimizer.fold()
    with carrier.applied(base):
        assert same(bits(base), bits(folded))
    assert same(bits(base), before)


def test_applying_twice_reverting_twice_and_wrong_models_are_errors_that_write_nothing(make_models, make_carrier):
    base, tuned = make_models()
    carrier, other = make_carrier(base, tuned), make_carrier(base, tuned, seed=1)
    before = bits(base)
    with pytest.raises(ValueError, match="got a model without a patch"):
        carrier.revert(base)
    carrier.apply(base)
    with pytest.raises(ValueError, match="this patch applied; revert it first"):
        carrier.apply(base)
    with pytest.raises(ValueError, match="another patch applied"):
        other.apply(base)
    with pytest.raises(ValueError, match="got one with another patch"):
        other.revert(base)
    carrier.revert(base)
    assert same(bits(base), before)
    with pytest.raises(ValueError, match=r"expected the carrier's base .* fingerprint"):
        carrier.apply(tuned)
    llama, _ = make_models("llama", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="expected the carrier's base"):
        carrier.apply(llama)
    with pytest.raises(RuntimeError, match="inside"), carrier.applied(base):
        raise RuntimeError("inside")
    assert same(bits(base), before)


def test_a_model_without_the_trained_norms_is_an_error_that_no_override_reaches(make_models):
    base, tuned = make_models("qwen3")
    with torch.no_grad():
        tuned.model.layers[0].self_attn.k_norm.weight += 0.1
    llama, _ = make_models("llama")
    with pytest.raises(ValueError, match=r"layers.0.self_attn.k_norm.weight' of shape .8,. .* got none") as caught:
        Carrier.from_models(base, tuned).check_base(llama)
    assert not isinstance(caught.value, WrongFingerprint)


def test_from_models_of_different_architectures_is_an_error(make_models):
    base, _ = make_models()
    llama, _ = make_models("llama")
    with pytest.raises(ValueError, match="other: expected architecture 'qwen3'"):
        Carrier.from_models(base, llama)
    with pytest.raises(ValueError, match=r"other: expected .*q_proj.weight as torch.float32, got torch.bfloat16"):
        Carrier.from_models(base, copy.deepcopy(base).bfloat16())


def test_channels_are_the_open_residual_gates_of_each_layer(make_models, make_carrier):
    base, tuned = make_models()
    carrier = make_carrier(base, tuned, density=0.2)

    def open_in(layer, *groups):
        found = set()
        for group in groups:
            found |= set((carrier.gate[carrier.layout.slice(layer, group)] != 0).nonzero()[:, 0].tolist())
        return sorted(found)

    cases = {
        "write": ("attn_write", "ffn_write"),
        "attn_write": ("attn_write",),
        "ffn_write": ("ffn_write",),
        "all_residual": ("attn_read", "attn_write", "ffn_read", "ffn_write"),
    }
    for kind, groups in cases.items():
        assert [c.tolist() for c in carrier.channels(kind)] == [open_in(layer, *groups) for layer in range(2)]
    write, random = carrier.channels("write"), carrier.channels("random", seed=3)
    assert [len(c) for c in random] == [len(c) for c in write]
    assert any(not torch.equal(a, b) for a, b in zip(random, write, strict=True))
    assert [c.tolist() for c in carrier.channels("random", seed=3)] == [c.tolist() for c in random]
    assert [len(c) for c in carrier.channels("none")] == [0, 0]
    with pytest.raises(ValueError, match="kind: expected one of"):
        carrier.channels("reads")


def test_sparsity_counts_closed_gates_of_each_group(make_models, make_carrier):
    base, tuned = make_models()
    carrier = make_carrier(base, tuned)
    sparsity, by_layer = carrier.sparsity(), carrier.sparsity_by_layer()
    assert list(sparsity) == ["overall", *GROUPS]
    for group in GROUPS:
        gates = torch.cat([carrier.gate[carrier.layout.slice(layer, group)] for layer in range(2)])
        assert sparsity[group] == pytest.approx(float((gates == 0).double().mean()))
        assert sum(layer[group] for layer in by_layer) / 2 == pytest.approx(sparsity[group])
    assert sparsity["overall"] == pytest.approx(float((carrier.gate == 0).double().mean()))


# ---------------------------------------------------------------- files


@pytest.fixture
def saved(make_models, make_carrier, tokenizer, tmp_path):
    base, tuned = make_models(dtype=torch.bfloat16)
    with torch.no_grad():
        decoder_layers(tuned)[1].input_layernorm.weight.add_(0.5)
    _, optimizer = trained(base, tuned, train_unmasked=True)
    carrier = optimizer.carrier().with_tokenizer(tokenizer)
    carrier.save_pretrained(tmp_path / "carrier")
    return base, carrier, tmp_path / "carrier"


def test_a_saved_carrier_comes_back_whole(saved):
    base, carrier, folder = saved
    again = Carrier.from_pretrained(folder)
    assert {f.name for f in folder.iterdir()} == {WEIGHTS, MANIFEST}
    for name in ("gate", "gate_logits", "initial_logits"):
        assert torch.equal(getattr(again, name), getattr(carrier, name))
    assert again.summary() == carrier.summary()
    assert (again.base_fingerprint, again.tokenizer) == (model_fingerprint(base), carrier.tokenizer)
    with carrier.applied(base):
        expected = bits(base)
    with again.applied(base):
        assert same(bits(base), expected)


def test_the_manifest_says_what_the_file_holds(saved):
    base, _, folder = saved
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["format_version"] == 1
    assert manifest["gate_kind"] == "hard_concrete"
    assert manifest["layout"]["groups"] == list(GROUPS)
    assert manifest["base_fingerprint"] == model_fingerprint(base)
    assert set(manifest["tokenizer"]) == {"tokenizer", "chat_template"}
    assert set(manifest["sparsity"]) == {"overall", *GROUPS}
    assert set(manifest["sha256"]) == {WEIGHTS}


def test_damage_to_a_saved_carrier_is_an_error_that_names_the_file(saved):
    _, _, folder = saved
    weights, manifest = folder / WEIGHTS, folder / MANIFEST
    whole, text = weights.read_bytes(), manifest.read_text()
    for damaged in (whole[:-1], whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], b""):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"carrier\.safetensors' is damaged"):
            Carrier.from_pretrained(folder)
    weights.unlink()
    with pytest.raises(ValueError, match=r"carrier.safetensors.* found none"):
        Carrier.from_pretrained(folder)
    weights.write_bytes(whole)
    manifest.write_text(text[:-20])
    with pytest.raises(ValueError, match=r"expected JSON in .*carrier.json"):
        Carrier.from_pretrained(folder)
    manifest.write_text(text.replace('"format_version": 1', '"format_version": 99'))
    with pytest.raises(ValueError, match=r"carrier\.json' is damaged"):
        Carrier.from_pretrained(folder)
    content = json.loads(text)
    del content["manifest_sha256"]
    write_manifest(manifest, {**content, "format_version": 99})
    with pytest.raises(ValueError, match=r"expected format_version 1 .* got 99"):
        Carrier.from_pretrained(folder)
    manifest.unlink()
    with pytest.raises(ValueError, match=r"expected carrier\.json"):
        Carrier.from_pretrained(folder)


def test_another_tokenizer_or_template_is_noticed(saved, tokenizer):
    _, carrier, _ = saved
    carrier.check_tokenizer(tokenizer)
    other = copy.deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template + " "
    with pytest.raises(ValueError, match="tokenizer: expected the chat template that the carrier was trained with"):
        carrier.check_tokenizer(other)


def test_parts_that_do_not_fit_together_are_an_error(make_models, make_carrier):
    from dataclasses import replace

    base, tuned = make_models()
    carrier = make_carrier(base, tuned)
    with pytest.raises(ValueError, match="gate: expected shape"):
        replace(carrier, gate=carrier.gate[:-1])
    with pytest.raises(ValueError, match=r"deltas\['model.layers.0.self_attn.q_proj'\]: expected shape"):
        replace(carrier, gate=torch.ones_like(carrier.gate))
    with pytest.raises(ValueError, match="deltas: expected a block for each of 14 matrices, got a difference in"):
        replace(carrier, deltas=dict(list(carrier.deltas.items())[1:]))
    with pytest.raises(ValueError, match="gate_kind: expected one of"):
        replace(carrier, gate_kind="soft")


# ---------------------------------------------------------------- for people and other programs


def test_the_channels_table_has_every_open_gate_and_the_norm_of_what_it_gates(make_models, make_carrier, site_gates):
    base, tuned = make_models()
    carrier = make_carrier(base, tuned)
    table = carrier.channels_table()
    assert len(table) == carrier.n_open
    squared = torch.zeros(carrier.layout.n_gates, dtype=torch.float64)
    for site in sites_of(base):  # row by row and column by column, on the whole matrix
        rows, cols = site_gates(carrier.gate.double(), carrier.layout, site)
        whole = torch.zeros(site.weight.shape, dtype=torch.float64)
        whole[(rows != 0)[:, None] & (cols != 0)] = carrier.deltas[site.name].double().flatten()
        entries = (rows[:, None] * cols * whole).square()
        numbers = torch.arange(carrier.layout.n_gates)
        row_of, col_of = site_gates(numbers, carrier.layout, site)
        for row, number in enumerate(row_of.tolist()):
            squared[number] += entries[row].sum()
        for col, number in enumerate(col_of.tolist()):
            squared[number] += entries[:, col].sum()
    for row in table:
        index = carrier.layout.slice(row["layer"], row["group"]).start + row["channel"]
        assert row["gate"] == float(carrier.gate[index])
        assert row["delta_norm"] == pytest.approx(float(squared[index].sqrt()), rel=1e-12)
    total = sum(row["delta_norm"] ** 2 for row in table)
    assert total == pytest.approx(2 * carrier.delta_norm() ** 2), "each entry has a row gate and a column gate"


def test_a_carrier_is_five_lines(make_models, make_carrier):
    base, tuned = make_models()
    carrier = make_carrier(base, tuned)
    lines = repr(carrier).splitlines()
    assert len(lines) == 5
    assert max(map(len, lines)) < 100
    assert f"{carrier.n_open:,} of {carrier.layout.n_gates:,}" in lines[1]
    assert carrier.base_fingerprint[:16] in lines[4]
    kept = sum(delta.numel() for delta in carrier.deltas.values())
    whole = sum(site.weight.numel() for site in sites_of(base))
    assert carrier.entry_density() == pytest.approx(kept / whole)
    assert Carrier.from_models(base, tuned).entry_density() == 1.0
    closed = with_gates(carrier, torch.zeros_like(carrier.gate))
    assert "layers none" in repr(closed)
    assert closed.channels_table() == []
