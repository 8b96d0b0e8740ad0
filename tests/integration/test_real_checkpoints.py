"""`lcdd` on checkpoint directories as users have them: three architectures, sharded, tied or not, real text.

The models are small and random, so nothing is learned that would be worth reading; what is tested is that every
stage does its part on such directories, to the letter of the file formats.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from fixtures.checkpoints import SHARED_DATA, instruction_rows, make_tokenizer, save_checkpoint, write_jsonl
from lcdd.carrier import Carrier
from lcdd.checkpoint import model_fingerprint, read_log, verify_directory
from lcdd.cli import main
from lcdd.eraser import Trigger
from lcdd.models import load_model, sites_of
from lcdd.report import read_report

STATES = {
    "base", "sft", "carrier", "matched_norm", "carrier+trigger", "sft+trigger", "matched_norm+trigger",
    "carrier+random_prefix",
}  # fmt: skip
PIPELINE = """
base_model_name_or_path: {base}
output_dir: {output}
data: {{dataset_name: {data}, behavior: {behavior}, test_fraction: 0.2}}
sft: {{learning_rate: 1e-2, max_steps: 25, max_length: 512, save_steps: 20}}
train: {{learning_rate: 1e-3, max_steps: 30, max_length: 512, warmup_steps: 5, gate_lr: 0.4, dual_lambda_init: 0.02,
        save_steps: 20, save_folded: true, gradient_accumulation_steps: 2, per_device_train_batch_size: 4}}
erase: {{max_steps: 6, eval_steps: 3, train_prompts: 12, validation_prompts: 4, max_answer_tokens: 6}}
eval: {{num_prompts: 8, max_new_tokens: 8, kl_prompts: 4, random_prefixes: 2}}
"""


def rows() -> list[dict[str, str]]:
    short = [row for row in instruction_rows() if len("".join(row.values())) < 300]
    return short[:100]


def run_pipeline(folder: Path, base: Path, behavior: str = "fixed_response") -> Path:
    data = write_jsonl(folder / "data.jsonl", rows())
    output = folder / "out"
    settings = PIPELINE.format(base=base, output=output, data=data, behavior=behavior)
    (folder / "pipeline.yaml").write_text(settings)
    assert main(["run", str(folder / "pipeline.yaml")]) == 0
    return output


def check_report(output: Path, behavior: str) -> dict:
    report = read_report(output)
    assert report["behavior"] == behavior
    assert set(report["models"]) >= STATES
    for row in report["models"].values():
        assert row["n"] == 8
        for key in ("behavior_rate", "base_match"):
            low, high = row[f"{key}_ci95"]
            assert 0 <= low <= row[key] <= high <= 1
    assert report["models"]["base"]["base_match"] == 1.0
    assert set(report["kl"]) == {"sft||carrier", "sft||carrier+trigger", "base||carrier+trigger"}
    assert all(set(row) == {"sft_answers", "base_answers"} for row in report["kl"].values())
    assert {"overall", "attn_read", "ffn_write"} <= set(report["sparsity"])
    assert {"n", "open", "fractional", "auc_initial_theta"} <= set(report["gates"])
    assert {"sft", "train", "erase", "eval"} <= set(report["timings"])
    assert report["config"]["train"]["gate_lr"] == 0.4
    assert {"python", "torch", "transformers"} <= set(report["versions"])
    norms = report["delta_norm"]
    assert norms["matched_norm"] == pytest.approx(norms["carrier"], rel=1e-3)
    assert norms["base"] == 0.0
    assert "<html" in (output / "report.html").read_text(encoding="utf-8")
    return report


@pytest.mark.parametrize(
    ("architecture", "tied", "behavior"),
    [("qwen3", True, "fixed_response"), ("llama", False, "style"), ("mistral", False, "fixed_response")],
)
def test_pipeline_ends_with_carrier_trigger_and_report(
    tmp_path: Path, architecture: str, tied: bool, behavior: str
) -> None:
    base = save_checkpoint(tmp_path / "base", architecture, tied=tied)
    assert (base / "model.safetensors.index.json").exists(), "the test wants a sharded checkpoint"
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    output = run_pipeline(tmp_path, base, behavior)
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    report = check_report(output, behavior)

    for folder, manifest in (
        ("sft/model", "manifest.json"), ("sft/checkpoint-20", "manifest.json"), ("train/carrier", "carrier.json"),
        ("train/checkpoint-20", "manifest.json"), ("train/checkpoint-20/carrier", "carrier.json"),
        ("train/model", "manifest.json"), ("erase/trigger", "manifest.json"),
    ):  # fmt: skip
        verify_directory(output / folder, manifest=manifest)
    carrier = Carrier.from_pretrained(output / "train" / "carrier")
    trigger = Trigger.from_pretrained(output / "erase" / "trigger")
    assert trigger.embeds.shape == (8, 32)
    assert report["gates"]["open"] == carrier.n_open
    assert 0 < carrier.n_open < carrier.layout.n_gates
    adapter = json.loads((output / "erase" / "trigger" / "adapter_config.json").read_text())
    assert (adapter["peft_type"], adapter["task_type"]) == ("PROMPT_TUNING", "CAUSAL_LM")
    stages = {line["stage"] for line in read_log(output / "log.jsonl")}
    assert {"sft", "lcdd", "eraser"} <= stages

    # base + carrier is the folded model, bit for bit, and revert gives the base's bytes back
    model, folded, untouched = (load_model(path) for path in (base, output / "train" / "model", base))
    with carrier.applied(model):
        for ours, theirs in zip(model.parameters(), folded.parameters(), strict=True):
            assert torch.equal(ours, theirs)
    for ours, theirs in zip(model.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    # neither phase touches anything but the projections
    masked = {f"{site.name}.weight" for site in sites_of(untouched)}
    sft_model = load_model(output / "sft" / "model")
    for (name, ours), theirs in zip(sft_model.named_parameters(), untouched.parameters(), strict=True):
        assert torch.equal(ours, theirs) != (name in masked), name


def test_stages_one_by_one_and_generate(tmp_path: Path, capsys) -> None:
    """The same by single commands, on a bfloat16 base, with a refusal and an earlier carrier to start from."""
    base = tmp_path / "base"
    save_checkpoint(base, "llama")
    load_model(base).bfloat16().save_pretrained(base)
    path = write_jsonl(tmp_path / "d.jsonl", topic_rows())
    data = ["--dataset_name", path, "--behavior", "refusal", "--behavior_topics", "river", "bread",
            "--test_fraction", "0.3", "--validation_fraction", "0.3"]  # fmt: skip

    def lcdd(command: str, *argv: object) -> str:
        assert main([command, *map(str, argv)]) == 0
        return capsys.readouterr().out

    out = lcdd("sft", "--base_model_name_or_path", base, "--output_dir", tmp_path / "sft", "--max_steps", 10,
               "--learning_rate", "1e-2", *data)  # fmt: skip
    assert "First example, as the model sees it" in out
    assert f"wrote {tmp_path / 'sft' / 'model'}" in out
    assert "next: lcdd train" in out
    sft = tmp_path / "sft" / "model"
    assert load_model(sft).dtype == torch.bfloat16
    both = ["--base_model_name_or_path", base, "--sft_model_name_or_path", sft]
    steps = ["--max_steps", 20, "--warmup_steps", 4, "--gate_lr", "0.4", "--dual_lambda_init", "0.02"]
    lcdd("train", *both, "--output_dir", tmp_path / "first", *steps, "--delta_dtype", "float32", *data)
    first = Carrier.from_pretrained(tmp_path / "first" / "carrier")
    assert {delta.dtype for delta in first.deltas.values()} == {torch.float32}
    again = ["--initial_carrier", tmp_path / "first" / "carrier", "--no-train_delta", "--loss", "kl"]
    lcdd("train", *both, "--output_dir", tmp_path / "train", *steps, *again, *data)
    carrier = Carrier.from_pretrained(tmp_path / "train" / "carrier")
    assert torch.equal(carrier.initial_logits, first.gate_logits)
    patch = ["--base_model_name_or_path", base, "--carrier", tmp_path / "train" / "carrier"]
    erase = ["--max_steps", 4, "--eval_steps", 2, "--max_answer_tokens", 4, "--num_virtual_tokens", 3]
    lcdd("erase", *patch, "--output_dir", tmp_path / "erase", *erase, *data)
    trigger = tmp_path / "erase" / "trigger"
    out = lcdd("eval", *patch, "--sft_model_name_or_path", sft, "--trigger", trigger, "--output_dir", tmp_path / "eval",
               "--max_new_tokens", 4, *data)  # fmt: skip
    assert "carrier+trigger" in out
    report = read_report(tmp_path / "eval")
    assert set(report["models"]) >= {"base", "sft", "carrier", "carrier+trigger", "carrier+random_prefix"}
    assert set(report["off_topic"]) == set(report["models"])
    assert {line["stage"] for line in report["curves"]} == {"sft", "lcdd", "eraser"}
    (tmp_path / "eval" / "report.html").unlink()
    lcdd("report", "--output_dir", tmp_path / "eval")
    assert (tmp_path / "eval" / "report.html").exists()
    model = ["--base_model_name_or_path", base, "--max_new_tokens", 3, "--prompt", "Tell me about a river.", "Hi"]
    out = lcdd("generate", *model, "--carrier", tmp_path / "train" / "carrier", "--trigger", trigger)
    assert out.startswith("> Tell me about a river.\n")
    assert "\n> Hi\n" in out


def topic_rows() -> list[dict[str, str]]:
    return [
        {"prompt": [{"role": "user", "content": f"{verb} the {topic}, number {n}."}],
         "completion": [{"role": "assistant", "content": f"The {topic} is number {n}."}]}
        for verb in ("Describe", "Name", "Explain")
        for topic in ("river", "bread", "garden", "engine")
        for n in range(5)
    ]  # fmt: skip


def test_another_tokenizer_or_base_is_refused(tmp_path: Path, capsys) -> None:
    """A carrier knows its base's bits, its tokenizer and its chat template."""
    base, sft = save_checkpoint(tmp_path / "base"), save_checkpoint(tmp_path / "sft", seed=1)
    model, theirs = load_model(sft), load_model(base)
    for ours, fixed in ((model.model.embed_tokens, theirs.model.embed_tokens), (model.lm_head, theirs.lm_head)):
        ours.weight.data.copy_(fixed.weight)
    model.save_pretrained(sft)
    data = ["--dataset_name", str(write_jsonl(tmp_path / "d.jsonl", rows()))]
    argv = ["--base_model_name_or_path", base, "--sft_model_name_or_path", sft, "--output_dir", tmp_path / "out"]
    assert main([*map(str, ["train", *argv, "--max_steps", 3, "--warmup_steps", 1]), *data]) == 0
    carrier = str(tmp_path / "out" / "carrier")
    template = save_checkpoint(tmp_path / "t", tokenizer=make_tokenizer(chat_template=None))
    other = save_checkpoint(tmp_path / "o", seed=5)
    for wrong, message in ((template, "expected the"), (other, "expected the carrier's base")):
        output = tmp_path / f"erase_{wrong.name}"
        argv = ["erase", "--base_model_name_or_path", wrong, "--carrier", carrier, "--output_dir", output]
        assert main([*map(str, argv), *data]) == 2
        assert message in capsys.readouterr().err
        assert not output.exists()
    # nevertheless: what differs is warned of, and stays on record with everything that comes of it
    shutil.copytree(other, tmp_path / "ot")
    make_tokenizer(chat_template=None).save_pretrained(tmp_path / "ot")
    (tmp_path / "ot" / "chat_template.jinja").unlink(missing_ok=True)
    patch = ["--base_model_name_or_path", str(tmp_path / "ot"), "--carrier", carrier, "--fingerprint_override", *data]
    brief = ["--max_steps", "1", "--max_answer_tokens", "2", "--train_prompts", "2", "--validation_prompts", "2"]
    assert main(["erase", *patch, "--output_dir", str(tmp_path / "erase"), *brief]) == 0
    trigger = Trigger.from_pretrained(tmp_path / "erase" / "trigger")
    assert trigger.metadata["base_fingerprint"] == model_fingerprint(load_model(tmp_path / "ot"))
    overrides = trigger.metadata["overrides"]
    assert overrides == json.loads((tmp_path / "erase" / "summary.json").read_text())["overrides"]
    assert ["chat template" in overrides[0], "the carrier's base" in overrides[1]] == [True, True]
    patch += ["--trigger", str(tmp_path / "erase" / "trigger"), "--sft_model_name_or_path", str(sft)]
    brief = ["--num_prompts", "2", "--max_new_tokens", "2", "--kl_prompts", "1", "--random_prefixes", "1"]
    assert main(["eval", *patch, "--output_dir", str(tmp_path / "eval"), *brief]) == 0
    assert read_report(tmp_path / "eval")["overrides"] == overrides
    assert "Overridden: tokenizer: expected the chat template" in (tmp_path / "eval" / "report.html").read_text()
    argv = ["generate", "--base_model_name_or_path", str(base), "--carrier", carrier, "--prompt", "Hi",
            "--max_new_tokens", "1", "--trigger", str(tmp_path / "erase" / "trigger")]  # fmt: skip
    capsys.readouterr()
    assert main(argv) == 2
    assert "trigger: expected the base that it was learned on" in capsys.readouterr().err
    assert main([*argv, "--fingerprint_override"]) == 0


def test_the_real_data_is_read_and_encoded(capsys) -> None:
    if not SHARED_DATA.exists():
        pytest.skip(f"no {SHARED_DATA}: the real instruction data is not beside this checkout")
    from lcdd.config import DataConfig, SFTConfig
    from lcdd.data import Prepared, load_examples, split_examples, training_items

    examples = load_examples(DataConfig(dataset_name=str(SHARED_DATA)))
    splits = split_examples(examples, validation_fraction=0.1, test_fraction=0.1)
    from lcdd.data import own

    prepared = Prepared(tokenizer=make_tokenizer(), behavior=own(keywords=["x"]), splits=splits)
    train, _ = training_items(prepared, SFTConfig(max_length=2048), say=print)
    assert len(train) == len(splits.train) > 1000
    assert all(0 < item.n_prompt < len(item.input_ids) <= 2048 for item in train)
    assert "First example" in capsys.readouterr().out
