"""Malformed inputs: each has to be one clear error, in under a second, with exit code 2 and nothing written.

    python -m benchmarks.bad_inputs     figures go to benchmarks/results/cpu/robustness.json

Data sets with a bad line, settings outside their range on the command line and in YAML, broken YAML, paths that lead
nowhere. Every case is one call of the command line's `main`, in this process.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import random
import sys
import tempfile
import time
import typing
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.crash_test import write_record

Case = tuple[str, list[str]]  # what is wrong, command line without --output_dir
LIMIT_SECONDS = 1.0

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
}


def data_cases(folder: Path, generator: random.Random) -> Iterator[Case]:
    """Each bad line at five places of a good file, for training and for evaluation data; and bad files."""
    good = [json.dumps({"instruction": f"Say {n}.", "input": "", "output": f"It is {n}."}).encode() for n in range(40)]
    behavior = ["--behavior", "own", "--behavior_keywords", "is"]
    for name, line in BAD_LINES.items():
        for place in (0, 39, *generator.sample(range(1, 39), 3)):
            path = folder / f"{name.replace(' ', '_')}-{place}.jsonl"
            path.write_bytes(b"\n".join([*good[:place], line, *good[place:]]) + b"\n")
            yield f"data: {name}", [*training(folder, path), *behavior]
    for name, content in {
        "empty": b"",
        "blank lines": b"\n \n\n",
        "one NUL": b"\0",
        "a BOM alone": b"\xef\xbb\xbf",
    }.items():
        path = folder / f"{name.replace(' ', '_')}.jsonl"
        path.write_bytes(content)
        yield f"data: {name} file", training(folder, path)
    yield "data: a directory", training(folder, folder)
    yield "data: no file", training(folder, folder / "none.jsonl")


def training(folder: Path, data: Path) -> list[str]:
    return ["sft", "--base_model_name_or_path", str(folder / "base"), "--dataset_name", str(data)]


def setting_cases(folder: Path) -> Iterator[Case]:
    """Every setting of sft and train outside its range, with a wrong choice or type; by flag and by YAML."""
    from lcdd.config import LCDDConfig, SFTConfig

    good = folder / "good.jsonl"
    for command, config in (("sft", SFTConfig), ("train", LCDDConfig)):
        start = [command, "--base_model_name_or_path", str(folder / "base"), "--dataset_name", str(good)]
        if command == "train":
            start += ["--base_model_name_or_path", str(folder / "base")]
        hints = typing.get_type_hints(config)
        for item in dataclasses.fields(config):
            bounds, hint = item.metadata.get("bounds", {}), str(hints[item.name])
            values: list[Any] = []
            if bounds.get("at_least") is not None:
                values.append(int(bounds["at_least"]) - 1)
            if bounds.get("above") is not None:
                values.append(bounds["above"])
            if bounds.get("below") is not None:
                values.append(bounds["below"])
            if item.metadata.get("choices") or "int" in hint or "float" in hint:
                values.append("nonsense")
            if "float" in hint:
                values.append("nan")
            for value in values:
                yield f"flag: {command} --{item.name} {value}", [*start, f"--{item.name}={value}"]
            path = folder / f"{command}-{item.name}.yaml"
            if "str" not in hint:
                path.write_text(json.dumps({item.name: {"nested": 1}}), encoding="utf-8")
                yield f"yaml: {command} {item.name}: a mapping", [*start, "--config", str(path)]


def yaml_cases(folder: Path) -> Iterator[Case]:
    """Files that are not settings, and pipelines whose sections are wrong."""
    texts = {
        "tab": "a:\n\t- b", "open bracket": "a: [1, 2", "a list": "- a\n- b", "a string": "hello",
        "unknown key": "learning_rat: 1", "python object": "!!python/object/apply:os.system ['true']",
        "not UTF-8": None, "a section for a number": "max_steps: [1]",
    }  # fmt: skip
    for name, text in texts.items():
        path = folder / f"{name.replace(' ', '_')}.yaml"
        path.write_bytes(b"a: \xff\xfe" if text is None else text.encode())
        yield f"yaml: {name}", [*training(folder, folder / "good.jsonl"), "--config", str(path)]
        yield f"pipeline: {name}", ["run", str(path)]
    base, data = str(folder / "base"), {"dataset_name": str(folder / "good.jsonl")}
    for name, more in {
        "unknown section": {"bogus": {}}, "a section that is a number": {"sft": 3},
        "a path inside": {"train": {"carrier": "x"}}, "a range": {"erase": {"max_steps": 0}},
        "bf16 apart": {"train": {"bf16": True}}, "no model": {"base_model_name_or_path": None},
        "a model that is not there": {"base_model_name_or_path": "nowhere/at/all"},
    }.items():  # fmt: skip
        path = folder / f"pipeline-{name.replace(' ', '_')}.yaml"
        path.write_text(json.dumps({"base_model_name_or_path": base, "data": data, **more}), encoding="utf-8")
        yield f"pipeline: {name}", ["run", str(path)]


def check(name: str, argv: list[str], output: Path) -> str | None:
    """Run one case; what is wrong with how it failed, or None."""
    from lcdd.cli import main

    out, errors = io.StringIO(), io.StringIO()
    start = time.perf_counter()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            code = main([*argv, "--output_dir", str(output)])
    except SystemExit as stop:  # argparse's own errors
        code = int(stop.code or 0)
    except BaseException as error:
        return f"{name}: raised {error!r}"
    seconds = time.perf_counter() - start
    said = [line for line in errors.getvalue().splitlines() if line.startswith("lcdd ")]
    if code != 2:
        return f"{name}: exit code {code}"
    if len(said) != 1 or ("expected" not in said[0] and "unknown" not in said[0]):
        return f"{name}: expected one clear line, got {said or errors.getvalue()[-200:]!r}"
    if seconds > LIMIT_SECONDS:
        return f"{name}: took {seconds:.2f} s"
    if output.exists():
        return f"{name}: wrote {sorted(path.name for path in output.rglob('*'))}"
    return None


def run_cases(folder: Path, *, every: int = 1, seed: int = 0) -> dict[str, Any]:
    """The figures of all cases, or of each `every`-th one."""
    from fixtures.checkpoints import SENTENCES, save_checkpoint, write_jsonl

    save_checkpoint(folder / "base")
    write_jsonl(folder / "good.jsonl", list(SENTENCES[:24]))
    cases = [*data_cases(folder, random.Random(seed)), *setting_cases(folder), *yaml_cases(folder)]
    check("warm-up: imports", training(folder, folder / "none.jsonl"), folder / "output")
    wrong, kinds = [], Counter[str]()
    for name, argv in cases[::every]:
        kinds[name.split(":")[0]] += 1
        if (found := check(name, argv, folder / "output")) is not None:
            wrong.append(found)
    total = sum(kinds.values())
    return {"inputs": total, "refused_clearly": total - len(wrong), "wrong": wrong, "kinds": dict(kinds)}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        record = run_cases(Path(folder), seed=arguments.seed)
    write_record("malformed_inputs", record)
    print(json.dumps(record, indent=2))
    return int(bool(record["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
