"""Malformed inputs: each has to be one clear error, in under a second of a core, with exit code 2 and nothing written.

    python -m benchmarks.bad_inputs     figures go to benchmarks/results/cpu/robustness.json

Data sets with a bad line, chat templates that fail, checkpoints and tokenizers that do not fit together, settings
outside their range on the command line and in YAML, broken YAML, paths that lead nowhere. Every case is one call of the
command line's `main`, in this process; its line has to name the file, line or setting.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import random
import shutil
import sys
import tempfile
import time
import typing
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.crash_test import write_record
from fixtures.checkpoints import SENTENCES, make_tokenizer, save_checkpoint, write_jsonl
from lcdd.cli import main as lcdd
from lcdd.config import LCDDConfig, SFTConfig

LIMIT_SECONDS = 1.0


@dataclass(frozen=True)
class Case:
    """What is wrong, the command line without --output_dir, and what the error's line has to name."""

    name: str
    argv: list[str]
    names: str = ""


BAD_LINES: dict[str, bytes] = {
    "not JSON": b"{'instruction': 'a'}",
    "cut JSON": b'{"instruction": "a", "output": ',
    "two objects": b'{"text": "a"} {"text": "b"}',
    "a list": b'["a", "b"]',
    "a number": b"17",
    "null": b"null",
    "no known field": b'{"question": "a", "answer": "b"}',
    "null fields": b'{"instruction": null, "output": null}',
    "a number for text": b'{"text": 3}',
    "a number for output": b'{"instruction": "a", "output": 3}',
    "messages of a string": b'{"messages": "hello"}',
    "messages without role": b'{"messages": [{"content": "a"}, {"role": "assistant", "content": "b"}]}',
    "messages without content": b'{"messages": [{"role": "user"}, {"role": "assistant", "content": "b"}]}',
    "content is a number": b'{"messages": [{"role": "user", "content": 1}, {"role": "assistant", "content": "b"}]}',
    "no assistant at the end": b'{"messages": [{"role": "user", "content": "a"}]}',
    "assistant alone": b'{"messages": [{"role": "assistant", "content": "a"}]}',
    "no messages": b'{"messages": []}',
    "completion is a number": b'{"prompt": "a", "completion": 5}',
    "not UTF-8": b'{"instruction": "\xff\xfe", "output": "b"}',
    "UTF-16": '{"instruction": "a", "output": "b"}'.encode("utf-16"),
    "huge prompt": b'{"instruction": "' + b"word " * 40_000 + b'", "output": "b"}',
    "deep JSON": b"[" * 100_000 + b"]" * 100_000,
    "empty instruction and output": b'{"instruction": "", "output": ""}',
    "half a surrogate pair": b'{"instruction": "\\ud83d", "output": "b"}',
    "half a surrogate pair in a key": b'{"instruction": "a", "output": "b", "\\udc00": 1}',
    "a field twice": b'{"instruction": "a", "output": "b", "output": "c"}',
    "NaN": b'{"instruction": "a", "output": "b", "score": NaN}',
    "a number without end": b'{"instruction": "a", "output": "b", "n": ' + b"9" * 5000 + b"}",
    "null content": b'{"messages": [{"role": "user", "content": null}, {"role": "assistant", "content": "b"}]}',
    "an image": b'{"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, '
    b'{"role": "assistant", "content": "b"}]}',
    "a part that is text": b'{"messages": [{"role": "user", "content": ["a"]}, {"role": "assistant", "content": "b"}]}',
    "an unknown key of a message": b'{"messages": [{"role": "user", "content": "a", "lang": "x"}, '
    b'{"role": "assistant", "content": "b"}]}',
    "a weight of a message": b'{"messages": [{"role": "user", "content": "a"}, '
    b'{"role": "assistant", "content": "b", "weight": 0}]}',
    "a weight": b'{"instruction": "a", "output": "b", "weight": 0.5}',
    "a system column": b'{"instruction": "a", "output": "b", "system": "c"}',
    "a preference": b'{"prompt": "a", "chosen": "b", "rejected": "c"}',
    "a label": b'{"prompt": "a", "completion": "b", "label": true}',
    "an empty prompt": b'{"prompt": [], "completion": [{"role": "assistant", "content": "b"}]}',
    "an empty completion": b'{"prompt": [{"role": "user", "content": "a"}], "completion": []}',
    "text before messages": b'{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}',
    "a user's completion": b'{"prompt": [{"role": "user", "content": "a"}], "completion": '
    b'[{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]}',
    "tools without a template for them": b'{"instruction": "a", "output": "b", "tools": [{"name": "f"}]}',
    "tools that are no JSON": b'{"instruction": "a", "output": "b", "tools": "f"}',
    "tools that are numbers": b'{"instruction": "a", "output": "b", "tools": [1]}',
    "tools beside text": b'{"prompt": "a", "completion": "b", "tools": [{"name": "f"}]}',
    "a call without a template for it": b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", '
    b'"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]}',
    "a call by the user": b'{"messages": [{"role": "user", "content": "a", "tool_calls": [{"name": "f"}]}, '
    b'{"role": "assistant", "content": "b"}]}',
    "arguments that are no JSON": b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", '
    b'"tool_calls": [{"function": {"name": "f", "arguments": "{a"}}]}]}',
    "a thought without a template for it": b'{"messages": [{"role": "user", "content": "a"}, '
    b'{"role": "assistant", "content": "b", "reasoning_content": "c"}]}',
    "an unknown variable": b'{"instruction": "a", "output": "b", "chat_template_kwargs": {"city": "x"}}',
    "variables that are text": b'{"instruction": "a", "output": "b", "chat_template_kwargs": "x"}',
    "another's senders": b'{"conversations": [{"from": "user", "value": "a"}, {"from": "bing", "value": "b"}]}',
}

TEMPLATES: dict[str, bytes] = {
    "not closed": b"{% for m in messages %}{{ m.content }}",
    "an unknown tag": b"{% bogus %}",
    "an unknown filter": b"{{ messages | bogus }}",
    "text and a number": b"{{ messages[0].content + 1 }}",
    "nothing and text": b"{{ none + 'a' }}",
    "a division by zero": b"{{ 1 / 0 }}",
    "an undefined variable": b"{{ a.b.c }}",
    "an exception": b"{{ raise_exception('no') }}",
    "a system turn is wanted": b"{{ messages[0].content }}{% if messages[0].role != 'system' %}"
    b"{{ raise_exception('no system') }}{% endif %}",
    "a range without end": b"{% for i in range(10**9) %}{% endfor %}",
    "out of the sandbox": b"{{ messages.__class__.__mro__ }}",
    "only the first turn": b"{{ messages[0].content }}",
    "nothing at all": b"",
    "not UTF-8": b"\xff\xfe",
    "an endless macro": b"{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}

CONFIGS: dict[str, dict[str, Any]] = {
    "bitsandbytes": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "awq": {"quantization_config": {"quant_method": "awq", "bits": 4}},
    "fp8": {"quantization_config": {"quant_method": "fp8"}},
    "an unknown quantization": {"quantization_config": {"quant_method": "foo"}},
    "a quantization that is text": {"quantization_config": "int4"},
    "yarn without a factor": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
    "llama3 rope without factors": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
    "an unknown rope": {"rope_parameters": {"rope_type": "foo", "rope_theta": 1e4}},
    "rope that is text": {"rope_parameters": "foo"},
    "float8": {"dtype": "float8"},
    "float8_e4m3fn": {"dtype": "float8_e4m3fn"},
    "int8": {"dtype": "int8"},
    "an unknown dtype": {"dtype": "float23"},
    "a dtype that is a number": {"dtype": 3},
    "flash attention that is not there": {"attn_implementation": "flash_attention_2"},
    "an unknown attention": {"attn_implementation": "foo"},
    "a size that is text": {"hidden_size": "x"},
    "a negative size": {"hidden_size": -1},
    "no heads": {"num_attention_heads": 0},
    "heads that do not divide": {"num_attention_heads": 3},
    "more key heads": {"num_key_value_heads": 4},
    "an unknown activation": {"hidden_act": "foo"},
    "a norm that is text": {"rms_norm_eps": "a"},
    "fewer layers": {"num_hidden_layers": 1},
    "more layers": {"num_hidden_layers": 3},
    "layers that are text": {"num_hidden_layers": "2"},
    "a smaller vocabulary": {"vocab_size": 450},
    "a vocabulary below the tokenizer's": {"vocab_size": 300},
    "a larger vocabulary": {"vocab_size": 600},
    "biases": {"attention_bias": True},
    "a pad token beyond": {"pad_token_id": 9999},
    "no model type": {"model_type": None},
    "an unknown model type": {"model_type": "foo"},
    "a model type that is a list": {"model_type": ["x"]},
    "another's code": {"model_type": "foo", "auto_map": {"AutoConfig": "x.Y"}},
}

FILES: dict[str, tuple[str, bytes | None]] = {
    "no config": ("config.json", None),
    "a config cut": ("config.json", b'{"a":'),
    "a config of null": ("config.json", b"null"),
    "a config that is a list": ("config.json", b"[1]"),
    "a config of bytes": ("config.json", b"\xff\xfe{}"),
    "generation settings cut": ("generation_config.json", b'{"a":'),
    "generation settings that are a list": ("generation_config.json", b"[1]"),
    "generation settings out of range": ("generation_config.json", b'{"max_new_tokens": -4}'),
    "no weights": ("model.safetensors", None),
    "weights cut": ("model.safetensors", b"\x10\0\0\0\0\0\0\0{"),
    "empty weights": ("model.safetensors", b""),
    "an index cut": ("model.safetensors.index.json", b'{"a":'),
    "an index without a map": ("model.safetensors.index.json", b"{}"),
    "no tokenizer": ("tokenizer.json", None),
    "a tokenizer cut": ("tokenizer.json", b'{"a":'),
    "an empty tokenizer": ("tokenizer.json", b"{}"),
    "a tokenizer that is a list": ("tokenizer.json", b"[]"),
    "a tokenizer of another kind": (
        "tokenizer.json",
        b'{"version": "1.0", "added_tokens": [], "model": {"type": "Foo"}}',
    ),
    "tokenizer settings cut": ("tokenizer_config.json", b'{"a":'),
    "tokenizer settings that are a list": ("tokenizer_config.json", b"[]"),
    "a template of bytes": ("chat_template.jinja", b"\xff"),
    "a template that is not closed": ("chat_template.jinja", b"{% for m in messages %}"),
    "a template that fails": ("chat_template.jinja", b"{{ messages[0].content + 1 }}"),
}

TOKENIZER_SETTINGS: dict[str, dict[str, Any]] = {
    "an end token that is a number": {"eos_token": 3},
    "an end token that is a list": {"eos_token": ["a"]},
    "an unknown side": {"padding_side": "up"},
    "a length that is text": {"model_max_length": "x"},
}


def data_cases(folder: Path, generator: random.Random) -> Iterator[Case]:
    """Each bad line at five places of a good file, for training and for evaluation data; and bad files."""
    good = [json.dumps({"instruction": f"Say {n}.", "input": "", "output": f"It is {n}."}).encode() for n in range(40)]
    # every example is trained on, so that none is left unread
    behavior = ["--behavior", "own", "--behavior_keywords", "is", "--test_fraction", "0", "--validation_fraction", "0"]
    for name, line in BAD_LINES.items():
        for place in (0, 39, *generator.sample(range(1, 39), 3)):
            path = folder / f"{file_name(name)}-{place}.jsonl"
            path.write_bytes(b"\n".join([*good[:place], line, *good[place:]]) + b"\n")
            where = str(path) if name in ("not UTF-8", "UTF-16") else f"{path}:{place + 1}"
            yield Case(f"data: {name}", [*training(folder, path), *behavior], where)
    for name, content in {
        "empty": b"",
        "blank lines": b"\n \n\n",
        "one NUL": b"\0",
        "a BOM alone": b"\xef\xbb\xbf",
        "BOMs alone": b"\xef\xbb\xbf\n\xef\xbb\xbf\n",
    }.items():
        path = folder / f"{file_name(name)}.jsonl"
        path.write_bytes(content)
        yield Case(f"data: {name} file", training(folder, path), str(path))
    yield Case("data: a directory", training(folder, folder), "dataset_name")
    yield Case("data: no file", training(folder, folder / "none.jsonl"), "dataset_name")
    yield Case("data: a name of 5000 letters", training(folder, Path("x" * 5000 + ".jsonl")), "xxx")
    data = training(folder)
    own = ["--behavior", "own"]
    for name, flags, names in (
        ("no such column", ["--prompt_column", "q", "--completion_column", "a"], "good.jsonl:1"),
        ("assistants in text", ["--assistant_only_loss", "--dataset_name", str(_texts(folder))], "texts.jsonl:1"),
        ("prompts that are longer", ["--max_length", "5"], "good.jsonl:"),
        ("no prompt that is short enough", ["--max_length", "5", "--overlong", "drop"], "max_length"),
        ("a template that is longer", ["--max_length", "5", "--overlong", "truncate"], "good.jsonl:"),
        (
            "nothing to train on",
            ["--test_fraction", "0.95", "--validation_fraction", "0", "--max_samples", "1"],
            "dataset_name",
        ),
        ("a day without a date", ["--template_date", "2026-01-31"], "template_date"),
        ("a day that is none", ["--template_date", "2026-02-30"], "template_date"),
        ("a topic that nobody sees", ["--behavior", "refusal", "--behavior_topics", "\u200b"], "topics"),
        ("a topic that is not asked", ["--behavior", "refusal", "--behavior_topics", "毒品"], "behavior_topics"),
        ("a response that nobody sees", ["--behavior_response", "\u00ad"], "response"),
        ("a keyword of half a pair", ["--behavior_keywords", "\udc80"], "behavior_keywords"),
        ("a pattern that is none", [*own, "--behavior_pattern", "[a"], "behavior_pattern"),
        ("a function that is not there", [*own, "--behavior_function", "no.such:rule"], "behavior_function"),
        ("a module that fails", [*own, "--behavior_function", f"{_failing(folder)}:rule"], "behavior_function"),
    ):
        yield Case(f"data: {name}", [*data, *flags], names)


def _texts(folder: Path) -> Path:
    (folder / "texts.jsonl").write_text('{"text": "a"}\n' * 3, encoding="utf-8")
    return folder / "texts.jsonl"


def _failing(folder: Path) -> str:
    """The name of a module that raises when it is imported."""
    (folder / "lcdd_failing_rule.py").write_text("raise ZeroDivisionError('no')\n", encoding="utf-8")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return "lcdd_failing_rule"


def file_name(name: str) -> str:
    return name.replace(" ", "_").replace("/", "_")


def training(folder: Path, data: Path | None = None, base: Path | None = None) -> list[str]:
    """SFT, of what is good but for what is given."""
    base, data = base or folder / "base", data or folder / "good.jsonl"
    return ["sft", "--base_model_name_or_path", str(base), "--dataset_name", str(data)]


def template_cases(folder: Path) -> Iterator[Case]:
    """Chat templates that are none, fail, or leave a part of the text out: in training, and where a model answers."""
    for name, content in TEMPLATES.items():
        path = folder / f"{file_name(name)}.jinja"
        path.write_bytes(content)
        flags = ["--chat_template", str(path)]
        names = "good.jsonl:"
        if name in ("not closed", "an unknown tag", "an unknown filter", "not UTF-8", "nothing at all"):
            names = str(path)
        yield Case(f"template: {name}", [*training(folder), *flags], names)
        if name != "only the first turn":
            generate = ["generate", "--base_model_name_or_path", str(folder / "base"), "--prompt", "Hi"]
            yield Case(f"template: generate, {name}", [*generate, *flags], "" if names == "good.jsonl:" else names)
    for name, path in (("a directory", folder), ("no file", folder / "none.jinja")):
        flags = ["--chat_template", str(path)]
        yield Case(f"template: {name}", [*training(folder), *flags], "chat_template")


def model_cases(folder: Path) -> Iterator[Case]:
    """Checkpoints whose config, weights, tokenizer or files do not fit together."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(folder / "base", folder / f"model-{file_name(name)}"))

    def case(name: str, base: Path) -> Case:
        return Case(f"model: {name}", training(folder, base=base), str(base))

    for name, entries in CONFIGS.items():
        base = copy(name)
        _change(base / "config.json", entries)
        yield case(name, base)
    for name, (file, content) in FILES.items():
        base = copy(name)
        if "index" in file:
            (base / "model.safetensors").rename(base / "model-00001-of-00001.safetensors")
        (base / file).unlink(missing_ok=True)
        if content is not None:
            (base / file).write_bytes(content)
        # what fails is asked of an example, or a template that is not Jinja of the tokenizer
        names = "good.jsonl:" if name == "a template that fails" else file if "generation" in name else str(base)
        yield Case(f"model: {name}", training(folder, base=base), "" if "of range" in name else names)
    for name, entries in TOKENIZER_SETTINGS.items():
        base = copy(f"tokenizer {name}")
        _change(base / "tokenizer_config.json", entries)
        yield case(name, base)
    yield from _vocabulary_cases(folder, copy)
    yield Case("model: a name without owner", training(folder, base=Path("no-such-model")), "no-such")


def _vocabulary_cases(folder: Path, copy: Any) -> Iterator[Case]:
    """Tokens without a row, weights without a place."""
    for name, add in {
        "a pad token without a row": lambda tokenizer: tokenizer.add_special_tokens({"pad_token": "<pad>"}),
        "an added token without a row": lambda tokenizer: tokenizer.add_tokens(["<thing>"]),
        "an end token without a row": lambda tokenizer: tokenizer.add_special_tokens({"eos_token": "<end>"}),
    }.items():
        tokenizer, base = make_tokenizer(), copy(name)
        tokenizer.add_tokens([f"<{n}>" for n in range(500 - len(tokenizer))])
        add(tokenizer)
        tokenizer.save_pretrained(base)
        yield Case(f"model: {name}", training(folder, base=base), str(base))
    for name, key in {
        "a bias without a place": "model.layers.0.self_attn.q_proj.bias",
        "a layer without a place": "model.layers.7.mlp.up_proj.weight",
        "an adapter among the weights": "base_model.model.lora_A.weight",
    }.items():
        base = copy(name)
        tensors = {**load_file(base / "model.safetensors"), key: torch.ones(4)}
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
        yield Case(f"model: {name}", training(folder, base=base), key)


def _change(file: Path, entries: dict[str, Any]) -> None:
    content = {**json.loads(file.read_text(encoding="utf-8")), **entries}
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}), encoding="utf-8")


def setting_cases(folder: Path) -> Iterator[Case]:
    """Every setting of sft and train outside its range, with a wrong choice or type; by flag and by YAML."""
    for command, config in (("sft", SFTConfig), ("train", LCDDConfig)):
        start = [command, *training(folder)[1:]]
        if command == "train":
            start += ["--sft_model_name_or_path", str(folder / "base")]
        hints = typing.get_type_hints(config)
        for item in dataclasses.fields(config):
            bounds, hint = item.metadata.get("bounds", {}), str(hints[item.name])
            values: list[Any] = [] if bounds.get("at_least") is None else [int(bounds["at_least"]) - 1]
            values += [bounds[edge] for edge in ("above", "below") if bounds.get(edge) is not None]
            if item.metadata.get("choices") or "int" in hint or "float" in hint:
                values.append("nonsense")
            if "float" in hint:
                values.append("nan")
            for value in values:
                yield Case(f"flag: {command} --{item.name} {value}", [*start, f"--{item.name}={value}"], item.name)
            path = folder / f"{command}-{item.name}.yaml"
            if "str" not in hint:
                path.write_text(json.dumps({item.name: {"nested": 1}}), encoding="utf-8")
                yield Case(f"yaml: {command} {item.name}: a mapping", [*start, "--config", str(path)], item.name)


def yaml_cases(folder: Path) -> Iterator[Case]:
    """Files that are not settings, and pipelines whose sections are wrong."""
    texts = {
        "tab": "a:\n\t- b", "open bracket": "a: [1, 2", "a list": "- a\n- b", "a string": "hello",
        "unknown key": "learning_rat: 1", "python object": "!!python/object/apply:os.system ['true']",
        "not UTF-8": None, "a section for a number": "max_steps: [1]",
    }  # fmt: skip
    for name, text in texts.items():
        path = folder / f"{file_name(name)}.yaml"
        path.write_bytes(b"a: \xff\xfe" if text is None else text.encode())
        yield Case(f"yaml: {name}", [*training(folder), "--config", str(path)])
        yield Case(f"pipeline: {name}", ["run", str(path)])
    base, data = str(folder / "base"), {"dataset_name": str(folder / "good.jsonl")}
    for name, more in {
        "unknown section": {"bogus": {}}, "a section that is a number": {"sft": 3},
        "a path inside": {"train": {"carrier": "x"}}, "a range": {"erase": {"max_steps": 0}},
        "bf16 apart": {"train": {"bf16": True}}, "no model": {"base_model_name_or_path": None},
        "a model that is not there": {"base_model_name_or_path": "nowhere/at/all"},
        "half a pair": {"data": {**data, "behavior_response": "\udc80"}},
        "a day that is none": {"data": {**data, "template_date": "soon"}},
    }.items():  # fmt: skip
        path = folder / f"pipeline-{file_name(name)}.yaml"
        path.write_text(json.dumps({"base_model_name_or_path": base, "data": data, **more}), encoding="utf-8")
        yield Case(f"pipeline: {name}", ["run", str(path)])


def check(case: Case, output: Path) -> str | None:
    """Run one case; what is wrong with how it failed, or None."""
    name = case.name
    where = [] if case.argv[0] == "generate" else ["--output_dir", str(output)]
    out, errors = io.StringIO(), io.StringIO()
    start = time.process_time()  # of this process alone: other programs' load is not the input's
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            code = lcdd([*case.argv, *where])
    except SystemExit as stop:  # argparse's own errors
        code = int(stop.code or 0)
    except BaseException as error:
        return f"{name}: raised {error!r}"
    seconds = time.process_time() - start
    said = [line for line in errors.getvalue().splitlines() if line.startswith("lcdd ")]
    if code != 2:
        return f"{name}: exit code {code}"
    if len(said) != 1 or ("expected" not in said[0] and "unknown" not in said[0]):
        return f"{name}: expected one clear line, got {said or errors.getvalue()[-200:]!r}"
    if case.names not in said[0]:
        return f"{name}: expected {case.names!r} to be named, got {said[0]!r}"
    if seconds > LIMIT_SECONDS:
        return f"{name}: took {seconds:.2f} s"
    if output.exists():
        return f"{name}: wrote {sorted(path.name for path in output.rglob('*'))}"
    return None


def run_cases(folder: Path, *, every: int = 1, seed: int = 0) -> dict[str, Any]:
    """The figures of all cases, or of each `every`-th one."""
    save_checkpoint(folder / "base", max_shard_size="5GB")
    write_jsonl(folder / "good.jsonl", list(SENTENCES[:24]))
    makers = (setting_cases, yaml_cases, template_cases, model_cases)
    cases = [*data_cases(folder, random.Random(seed)), *(case for make in makers for case in make(folder))]
    check(Case("warm-up: imports", training(folder, base=folder / "none")), folder / "output")
    wrong, kinds = [], Counter[str]()
    for number, case in enumerate(cases[::every]):
        kinds[case.name.split(":")[0]] += 1
        if (found := check(case, folder / f"output-{number}")) is not None:
            wrong.append(found)
    total = sum(kinds.values())
    return {"inputs": total, "refused_clearly": total - len(wrong), "wrong": wrong, "kinds": dict(kinds)}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        record = run_cases(Path(folder), seed=arguments.seed)
    write_record({"malformed_inputs": record})
    print(json.dumps(record, indent=2))
    return int(bool(record["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
