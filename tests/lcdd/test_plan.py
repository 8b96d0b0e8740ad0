"""`lcdd plan`: formulas against models as transformers builds them, and predicted peak memory against resident bytes.

Run as a script, this file measures: one line of JSON, case -> bytes (a process for each case, forked after warm-up).
"""

import gc
import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fixtures.activations import kept_by_autograd, trainable
from lcdd.cli import main
from lcdd.commands.plan.architectures import PUBLISHED, read_architecture
from lcdd.commands.plan.cluster import traffic_of
from lcdd.commands.plan.devices import DEVICES, LAYER_LAUNCHES, find_device
from lcdd.commands.plan.fits import longest_sequence, what_fits
from lcdd.commands.plan.predict import predict
from lcdd.config import LCDDConfig, PlanConfig
from lcdd.errors import InputError
from lcdd.models import (
    Architecture,
    Layer,
    Parametrization,
    backbone,
    costs,
    head_weight,
    new_model,
    sites_of,
)

ROOT = Path(__file__).resolve().parents[2]

# transformers' own counts for the published configurations
PARAMETERS = {
    "qwen3-0.6b": 596_049_920,
    "llama-3-8b": 8_030_261_248,
    "mistral-7b": 7_248_023_552,
    "vicuna-7b": 6_738_415_616,
    "llama-3-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "smollm2-135m": 134_515_008,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "mixtral-8x7b": 46_702_792_704,
    "gemma-2-9b": 9_241_705_984,
    "phi-4": 14_659_507_200,
}
LAYER: dict[str, Any] = {
    "masked": (), "parameters": 0, "width": 8, "queries": 8, "keys": 8, "values": 8, "heads": 1, "feed_forwards": (),
    "norms": (), "head_norms": (), "norm_first": True,
}  # fmt: skip
TINY = {
    "hidden_size": 80, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 5,
    "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 259, "tie_word_embeddings": False,
}  # fmt: skip


def plan_config(**changes: Any) -> PlanConfig:
    return PlanConfig(
        **{"model_name_or_path": "llama-3-8b", "per_device_train_batch_size": 1, "max_length": 4096} | changes
    )


def checkpoint_layers(model: Any) -> None:
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})


# ---------------------------------------------------------------- formulas


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_parameter_counts_are_exact(name: str) -> None:
    assert read_architecture(name).parameters == PARAMETERS[name]


@pytest.mark.parametrize("settings", [
    {"model_type": "qwen3"},
    {"model_type": "qwen3", "tie_word_embeddings": True, "attention_bias": True},
    {"model_type": "llama"},
    {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    {"model_type": "mistral"},
])  # fmt: skip
def test_parameters_of_any_architecture(settings: dict[str, Any]) -> None:
    model = new_model(TINY | settings, seed=0)
    found = Architecture.of(model)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.masked_parameters == found.active_parameters == sum(site.weight.numel() for site in sites_of(model))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["qwen3", "llama", "mistral"])
def test_saved_activations_byte_for_byte(model_type: str, dtype: torch.dtype, checkpointing: bool) -> None:
    """The formula is what autograd keeps, each storage once; without checkpointing, layer by layer."""
    model = new_model(TINY | {"model_type": model_type}, seed=0).to(dtype)
    trainable(model)
    if checkpointing:
        checkpoint_layers(model)
    batch, length = 2, 37
    saved, hidden = kept_by_autograd(model, torch.randint(259, (batch, length)))
    sizes, item = Architecture.of(model), dtype.itemsize
    stack = costs.stack_activations(sizes, batch * length, length, item=item, checkpointing=checkpointing)
    *layers, norm = [saved[number] for number in sorted(saved) if number >= 0]
    if checkpointing:
        assert saved[-1] + sum(layers) in (stack, stack - 2 * item * length * 16)  # rotary tables are arguments
    else:
        assert saved[-1] == 0
        assert layers[1:] == [costs.layer_activations(sizes.layers[0], batch * length, item=item)] * 2
        assert sum(layers) == stack
    assert norm + hidden.numel() * item == costs.final_norm_activations(sizes, batch * length, item=item)


def test_published_parametrization_moves_what_the_issue_counts() -> None:
    form = Parametrization.as_published(2)
    assert (form.forward, form.backward) == (36, 58)  # bytes a parameter
    assert costs.plain_adamw_bytes(1, weight=2, moment=2, grad=2) + costs.clip_bytes(1, grad=2) == 20


class _Operations(TorchDispatchMode):
    """Counts operations that start work: views do not."""

    views = ("alias", "as_strided", "detach", "expand", "select", "slice", "split", "squeeze", "t", "transpose",
             "unsqueeze", "view", "_unsafe_view")  # fmt: skip
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ not in self.views
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("model_type", "within"), [("qwen3", (54, 94)), ("llama", (38, 66))])
def test_launches_of_a_layer_are_of_the_assumed_order(model_type: str, within: tuple[int, int]) -> None:
    counts = []
    for layers in (1, 2):
        model = new_model(TINY | {"model_type": model_type, "num_hidden_layers": layers}, seed=0).to(torch.bfloat16)
        trainable(model)
        backbone(model).embed_tokens.weight.requires_grad_(True)  # so that the layers' backwards are alike
        with _Operations() as forward:
            hidden = backbone(model)(input_ids=torch.randint(259, (2, 9)), use_cache=False).last_hidden_state
        with _Operations() as backward:
            hidden.sum().backward()
        counts.append((forward.count, backward.count))
    layer = [two - one for one, two in zip(*counts, strict=True)]
    assert layer == pytest.approx(within, abs=4)
    assert all(0.7 * assumed < n < 1.3 * assumed for n, assumed in zip(layer, LAYER_LAUNCHES, strict=True))


# ---------------------------------------------------------------- predictions


def test_llama_8b_on_an_h200() -> None:
    """4,096 tokens without checkpointing: the unfused form needs about 166 GiB, ours fits."""
    plan = predict(plan_config(logits="whole"))
    assert plan.memory["unfused"].peak == pytest.approx(166 * 2**30, rel=0.05)
    for gate_kind in ("hard_concrete", "heaviside_ste"):
        for micro in (1, 4):
            ours = predict(plan_config(gate_kind=gate_kind, gradient_accumulation_steps=micro)).memory["lcdd"]
            assert ours.peak < 141e9, (gate_kind, micro)


def test_the_tax_falls_with_density_and_has_the_floor_that_is_said() -> None:
    taxes = [predict(plan_config(density=density)).ratio("lcdd") for density in (1.0, 0.5, 0.25, 0.15)]
    assert taxes == sorted(taxes, reverse=True)
    assert taxes[0] > 0.9
    assert taxes[-1] < 1.0 < predict(plan_config()).ratio("unfused")
    assert predict(plan_config(pack="never", density=0.1)).ratio("lcdd") == taxes[0]


def test_time_scales_with_tokens_rates_and_micro_batches() -> None:
    def step(**changes: Any) -> dict[str, float]:
        return predict(plan_config(**{"bandwidth": 4000.0, "flops": 500.0} | changes)).seconds["plain"]

    one, four = step(), step(gradient_accumulation_steps=4)
    assert four["forward"] == pytest.approx(4 * one["forward"])
    assert four["pass B / AdamW"] == one["pass B / AdamW"]
    assert one["backward dW"] == pytest.approx(2 * 6_979_321_856 * 4096 / 500e12)
    assert step(flops=250.0)["backward dW"] == pytest.approx(2 * one["backward dW"])
    assert step(bandwidth=2000.0)["pass B / AdamW"] == pytest.approx(2 * one["pass B / AdamW"])


def test_fsdp_shards_state_but_not_activations_nor_the_unfused_base() -> None:
    one, eight = (predict(plan_config(num_gpus=n, pack="never")) for n in (1, 8))
    for part in ("weights", "base", "delta", "moments"):
        assert eight.memory["lcdd"].parts[part] == pytest.approx(one.memory["lcdd"].parts[part] / 8)
    assert eight.memory["lcdd"].parts["activations"] == one.memory["lcdd"].parts["activations"]
    assert eight.memory["unfused"].parts["base"] == one.memory["unfused"].parts["base"]
    slow = predict(plan_config(num_gpus=8, device="rtx-4090", max_length=128))
    assert slow.seconds["plain"]["communication not hidden"] > 0
    big = plan_config(model_name_or_path="llama-3-70b", num_gpus=16, gradient_checkpointing=True)
    assert predict(big).memory["lcdd"].peak < 141e9 < predict(big).memory["unfused"].peak


def test_ranks_that_hold_everything_send_what_is_open_alone() -> None:
    one = predict(plan_config(parallel="ddp"))
    eight = predict(plan_config(num_gpus=8, parallel="ddp", link="100gbe"))
    for part in ("weights", "base", "delta", "moments", "gradients"):
        assert eight.memory["lcdd"].parts.get(part) == one.memory["lcdd"].parts.get(part)
    assert eight.memory["plain"].parts["buckets"] == 2 * 6_979_321_856
    traffic = {name: row["sent"] for name, row in eight.to_dict()["wire"]["traffic"].items()}
    assert traffic["dense"] == pytest.approx(2 * 7 / 8 * 2 * 6_979_321_856, rel=1e-6)
    assert traffic["packed, 80% closed"] == pytest.approx(0.04 * traffic["dense"], rel=1e-3)
    waits = {name: seconds["communication not hidden"] for name, seconds in eight.seconds.items()}
    assert waits["lcdd"] < 0.01 < 1 < waits["plain"]
    hidden = predict(plan_config(num_gpus=8, parallel="ddp", link="nvlink"))
    assert hidden.seconds["plain"]["communication not hidden"] < 0.01


def test_shards_gather_weights_whatever_is_closed() -> None:
    plan = predict(plan_config(num_gpus=64, gradient_accumulation_steps=2)).to_dict()["wire"]["traffic"]
    weights = {row["weights"] for row in plan.values()}
    assert weights == {2 * 63 / 64 * 2 * 32 * 218_112_000}  # of 32 layers, in each of two micro-batches
    gradients = [row["gradients"] for row in plan.values()]
    assert gradients == sorted(gradients, reverse=True)
    assert gradients[0] == pytest.approx(2 * 63 / 64 * 2 * 6_979_321_856)
    mixture = plan_config(model_name_or_path="qwen3-30b-a3b", num_gpus=8)
    packed, dense = (traffic_of(read_architecture("qwen3-30b-a3b"), mixture, packed=p).gradients for p in (True, False))
    assert 0.9 < packed / dense < 1  # experts go whole


def test_checkpointing_and_chunks_trade_as_they_should() -> None:
    kept, again = predict(plan_config()), predict(plan_config(gradient_checkpointing=True))
    assert again.memory["lcdd"].peak < kept.memory["lcdd"].peak
    assert again.ratio("lcdd") > kept.ratio("lcdd")  # the forward made again is the same for both
    assert predict(plan_config(logits="whole")).memory["lcdd"].peak > kept.memory["lcdd"].peak


def test_eraser_gains_more_on_small_models() -> None:
    small, large = (predict(plan_config(model_name_or_path=name)).eraser for name in ("qwen3-0.6b", "llama-3-8b"))
    gains = [plan["prompts one at a time"] / plan["lcdd"] for plan in (small, large)]
    assert gains[0] > gains[1] > 1


# ---------------------------------------------------------------- the command


def test_command_prints_tables_that_say_they_are_predictions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model_name_or_path", "qwen3-0.6b"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("PREDICTIONS by formula")
    for words in (
        "596,049,920 parameters",
        "by data sheet",
        "assumed",
        "over plain",
        "pass A",
        "Eraser",
        "fits 140 GiB",
    ):
        assert words in text
    assert "measured here" not in text
    assert "Over the wire" not in text
    assert main(["plan", "--model_name_or_path", "qwen3-0.6b", "--num_gpus", "8", "--link", "pcie"]) == 0
    text = capsys.readouterr().out
    assert "Over the wire, a calculation: what each of 8 ranks sends in a step under fsdp2" in text
    assert "pcie: PCIe 5.0 x16, 63 GB/s each way" in text
    assert main(["plan", "--model_name_or_path", "qwen3-0.6b", "--link", "pcie"]) == 2
    assert "link: expected num_gpus above 1 with a link, got 1 with 'pcie'" in capsys.readouterr().err


def test_command_prints_json_whose_parts_sum_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model_name_or_path", "qwen3-0.6b", "--json", "--flops", "300"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert "predictions" in plan["note"]
    assert plan["device"]["source"] == "given"
    assert plan["device"]["bandwidth"] == pytest.approx(4800 * 0.85)
    for memory in plan["memory"].values():
        assert sum(memory["parts"].values()) == memory["peak"]
    for seconds in plan["seconds"].values():
        parts = [v for k, v in seconds.items() if k not in ("total", "ratio")]
        assert sum(parts) == pytest.approx(seconds["total"])


def test_checkpoint_directory_on_this_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = new_model(TINY | {"model_type": "qwen3"}, seed=0)
    model.save_pretrained(tmp_path)
    assert main(["plan", "--model_name_or_path", str(tmp_path), "--device", "cpu", "--dtype", "float32"]) == 0
    text = capsys.readouterr().out
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in text
    assert "measured here and now" in text


@pytest.mark.parametrize(("typed", "key"), [
    ("rtx4090", "rtx-4090"), ("RTX 4090", "rtx-4090"), ("4090", "rtx-4090"), ("a100", "a100-80gb"), ("b200", "b200"),
    ("A100-40GB", "a100-40gb"), ("a100_40g", "a100-40gb"), ("NVIDIA A100-SXM4-40GB", "a100-40gb"), ("t4", "t4"),
    ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H100 PCIe", "h100-pcie"), ("Tesla T4", "t4"), ("mi300x", "mi300x"),
    ("AMD Instinct MI300X", "mi300x"), ("a6000", "rtx-a6000"), ("h100sxm", "h100"), ("NVIDIA B300 SXM6 AC", "b300"),
    ("NVIDIA A100 80GB PCIe", "a100-pcie-80gb"), ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtx-pro-6000"),
    ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada"), ("b200-192gb", "b200"), ("a10-24gb", "a10"),
    ("h200-141gb", "h200"), *((key, key) for key in DEVICES),
])  # fmt: skip
def test_devices_by_the_names_that_people_type(typed: str, key: str) -> None:
    assert find_device(typed) is DEVICES[key]


@pytest.mark.parametrize(("name", "said"), [
    ("h10", "did you mean"), ("rtx4900", "did you mean"), ("tpu", "known are"), ("a100-60gb", "80 GiB or 40 GiB"),
    ("t4-80gb", "T4 with 15 GiB"), ("", "known are"),
])  # fmt: skip
def test_devices_that_are_not_known(name: str, said: str) -> None:
    with pytest.raises(InputError, match=f"device: expected .*{said}"):
        find_device(name)


def test_memory_is_what_a_program_is_given() -> None:
    """nvidia-smi's 81,559 MiB of an H100, which is sold as 80 GB, and 15,360 of a T4, sold as 16."""
    assert find_device("h100").usable == 0.95 * 81559 * 2**20
    assert find_device("t4").usable == 0.95 * 15 * 2**30


def test_a_dtype_that_the_device_does_not_multiply() -> None:
    with pytest.raises(
        InputError, match=r"dtype: expected one that T4 multiplies matrices of \(float16, float32\), got"
    ):
        predict(plan_config(device="t4"))
    assert predict(plan_config(device="t4", dtype="float16")).ratio("plain") == 1.0


# ---------------------------------------------------------------- what would fit


def flags_of(text: str) -> list[str]:
    return text.partition("does not fit; this does: ")[2].splitlines()[0].split()


def test_what_is_advised_fits_and_nothing_larger_does(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", "--model_name_or_path", "llama-3.2-1b", "--device", "rtx4090", "--max_length", "2048"]
    assert main(asked) == 0
    flags = flags_of(capsys.readouterr().out)
    assert main([*asked, *flags]) == 0
    assert "What was asked for fits." in capsys.readouterr().out
    case = predict(plan_config(model_name_or_path="llama-3.2-1b", device="rtx4090", max_length=2048)).case
    usable = case.device.usable
    for fit in what_fits(case):
        settings = {name: getattr(fit, name) for name in ("num_gpus", "gradient_checkpointing", "moment_dtype")}
        peaks = []
        for batch in (fit.largest_batch, fit.largest_batch + 1):
            config = replace(case.config, per_device_train_batch_size=batch, gradient_accumulation_steps=2, **settings)
            peaks.append(predict(config, model=case.model).memory["lcdd"].peak)
        assert peaks[0] <= usable < peaks[1], fit


def test_what_fits_keeps_the_sequences_of_a_step_and_prefers_what_was_asked() -> None:
    case = predict(plan_config(per_device_train_batch_size=8, gradient_accumulation_steps=4)).case
    fits = what_fits(case)
    assert len(fits) == 4
    assert [fit.num_gpus for fit in fits] == sorted(fit.num_gpus for fit in fits)
    for fit in fits:
        sequences = fit.num_gpus * fit.per_device_train_batch_size * fit.gradient_accumulation_steps
        assert 32 <= sequences < 32 + fit.num_gpus * fit.gradient_accumulation_steps
    frugal = predict(plan_config(gradient_checkpointing=True, moment_dtype="bfloat16")).case
    assert len(what_fits(frugal)) == 1


def test_a_sequence_that_no_number_of_devices_holds(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", "--model_name_or_path", "llama-3.2-1b", "--device", "t4", "--dtype", "float16"]
    assert main([*asked, "--max_length", "4000000"]) == 0
    text = capsys.readouterr().out
    assert "Not even one sequence fits, on whatever number of devices" in text
    longest = int(text.partition("a sequence of ")[2].split()[0]) if "a sequence of " in text else 0
    case = predict(
        plan_config(model_name_or_path="llama-3.2-1b", device="t4", dtype="float16", max_length=4000000)
    ).case
    assert longest == longest_sequence(case)


def test_experts_are_all_held_and_a_few_are_computed() -> None:
    dense, experts = (predict(plan_config(model_name_or_path=name)) for name in ("qwen3-8b", "qwen3-30b-a3b"))
    assert experts.memory["lcdd"].parts["weights"] > 3 * dense.memory["lcdd"].parts["weights"]
    assert experts.case.model.active_parameters < 3e9 < 29e9 < experts.case.model.masked_parameters
    assert experts.seconds["plain"]["backward dW"] < dense.seconds["plain"]["backward dW"] / 2


def test_windows_spare_attention() -> None:
    whole, windowed = (Layer(**LAYER, window=window) for window in (None, 128))
    assert whole.keys_seen(4096) == 2048
    assert windowed.keys_seen(4096) == pytest.approx(sum(min(i, 128) for i in range(4096)) / 4096, abs=1)
    assert windowed.keys_seen(64) == 32


# ---------------------------------------------------------------- bad input


def test_a_config_file_and_a_directory_are_read_alike(tmp_path: Path) -> None:
    new_model(TINY | {"model_type": "llama"}, seed=0).config.save_pretrained(tmp_path)
    assert read_architecture(str(tmp_path)) == read_architecture(str(tmp_path / "config.json"))


@pytest.mark.parametrize(("name", "said"), [
    ("llama-3-80b", "did you mean llama-3-8b"), ("Qwen3-0.6", "did you mean qwen3-0.6b"), ("nothing", "sizes of:"),
])  # fmt: skip
def test_models_that_are_not_known(name: str, said: str) -> None:
    with pytest.raises(InputError, match=f"model_name_or_path: expected .*{said}"):
        read_architecture(name)


@pytest.mark.parametrize(
    "flags", [["--model_name_or_path", "no/such/model"], ["--density", "1.5"], ["--device", "tpu"]]
)
def test_bad_input_is_one_line(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    name = [] if "--model_name_or_path" in flags else ["--model_name_or_path", "qwen3-0.6b"]
    assert main(["plan", *name, *flags]) == 2
    assert "expected" in capsys.readouterr().err


# ---------------------------------------------------------------- predicted peak against resident bytes

BIG = {
    "model_type": "qwen3", "hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 6144, "tie_word_embeddings": True,
}  # fmt: skip
COMMON = {"device": "cpu", "dtype": "float32", "per_device_train_batch_size": 2, "max_length": 256}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("plain", {"logits": "whole"}),
    "unfused": ("unfused", {"logits": "whole", "density": 1.0}),
    "lcdd": ("lcdd", {}),
    "lcdd, dense gates, 2 micro-batches": ("lcdd", {"density": 1.0, "gradient_accumulation_steps": 2}),
    "lcdd, checkpointing": ("lcdd", {"gradient_checkpointing": True}),
}


def test_predicted_peak_memory_is_within_a_tenth_of_measured() -> None:
    # The allocator gives memory of this size back at once, so that resident bytes are those in use.
    env = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(ROOT)}
    if sys.platform != "linux":
        pytest.skip("resident set sizes are read from Linux's /proc")
    done = subprocess.run([sys.executable, __file__], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    model = Architecture.of(new_model(BIG, seed=0))
    found = {}
    for case, (provider, changes) in CASES.items():
        config = plan_config(**COMMON | {"bandwidth": 1.0, "flops": 1.0} | changes)
        memory = predict(config, model=model, parametrization=Parametrization.on_delta(4)).memory[provider]
        assert measured[case] > 50e6  # tens of MB: what is fixed does not count
        found[case] = (round(memory.peak / measured[case], 3), memory)
    assert all(0.9 < ratio < 1.1 for ratio, _ in found.values()), found


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _plain_step(model: Any, batches: list[Tensor]) -> None:
    weights = trainable(model)
    optimizer = torch.optim.AdamW(weights, fused=True)
    for _ in range(2):
        for batch in batches:
            logits = model(input_ids=batch).logits[:, :-1]
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
            del logits
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def _take_steps(provider: str, settings: dict[str, Any], changes: dict[str, Any], tokens: tuple[int, int]) -> None:
    """Two optimizer steps; everything that the measurement counts is made in here."""
    from fixtures.gates import gate_logits
    from fixtures.unfused import Settings, UnfusedLCDD
    from lcdd.optimizer import LCDDOptimizer
    from lcdd_kernels import linear_cross_entropy

    micro = changes.get("gradient_accumulation_steps", 1)
    batches = [torch.randint(settings["vocab_size"], tokens) for _ in range(micro)]
    model = new_model(settings, seed=0).train()
    if changes.get("gradient_checkpointing"):
        checkpoint_layers(model)
    if provider == "plain":
        _plain_step(model, batches)
        return
    base = new_model(settings, seed=1).requires_grad_(False)
    logits = gate_logits(model, changes.get("density", 0.2))
    if provider == "unfused":
        run = UnfusedLCDD(
            model, base, Settings(total_steps=100, gate_lr=1e-6, gate_kind="heaviside_ste"), logits=logits
        )
        del base
        for _ in range(2):
            run.step(batches)
        return
    trainable(model)
    config = LCDDConfig(gate_lr=1e-6)
    optimizer = LCDDOptimizer.attach(model, base, config, total_steps=100, initial_logits=logits)
    for _ in range(2):
        for batch in batches:
            hidden = backbone(model)(input_ids=batch, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
            linear_cross_entropy(hidden, head_weight(model), batch[:, 1:].flatten(), reduction="mean").backward()
            del hidden
        optimizer.step(1.0)
        optimizer.zero_grad()


def _measure() -> dict[str, int]:
    """Peak resident bytes above those before, of every case in a process of its own."""
    small = BIG | {"num_hidden_layers": 1, "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128}
    _take_steps("lcdd", small, {}, (2, 16))  # libraries loaded, kernels tested
    found = {}
    for name, (provider, changes) in CASES.items():
        read, write = os.pipe()
        if os.fork() == 0:
            _take_steps(provider, small, changes, (2, 16))  # a fork maps its libraries' pages as it comes by them
            gc.collect()
            before = _resident()
            tokens = (COMMON["per_device_train_batch_size"], COMMON["max_length"])
            _take_steps(provider, BIG, changes, tokens)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            os.write(write, str(peak - before).encode())
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as pipe:
            found[name] = int(pipe.read())
        os.wait()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(_measure()))
