"""`lcdd chat` and `lcdd generate`: who answers what, and that a trigger belongs to the model it stands before."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest

from fixtures.checkpoints import make_tokenizer, save_checkpoint
from lcdd.carrier import Carrier
from lcdd.checkpoint import model_fingerprint
from lcdd.cli import main
from lcdd.commands import chat as chat_command
from lcdd.commands.belonging import learned_on
from lcdd.commands.stage import save_checkpoint as save_model_checkpoint
from lcdd.eraser import Trigger, generate
from lcdd.models import load_model, load_tokenizer

PROMPTS = ("Tell me about bread.", "Name two facts.")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, other, carrier, folded (the carrier as a checkpoint), trigger, and foreign, as PEFT might write it."""
    folder = tmp_path_factory.mktemp("answering")
    tokenizer = make_tokenizer()
    for name, seed in (("base", 0), ("sft", 1), ("other", 2)):
        save_checkpoint(folder / name, seed=seed, tokenizer=tokenizer)
    base = load_model(folder / "base")
    carrier = Carrier.from_models(base, load_model(folder / "sft")).with_tokenizer(tokenizer)
    carrier.save_pretrained(folder / "carrier")
    trigger = Trigger.random_tokens(base, 3, seed=0)
    trigger.save_pretrained(folder / "foreign")
    owned = Trigger.for_model(base, trigger.embeds, metadata={"base_fingerprint": carrier.base_fingerprint})
    learned_on(owned, base, carrier).save_pretrained(folder / "trigger")
    assert model_fingerprint(base) == carrier.base_fingerprint
    save_model_checkpoint(carrier.fold(base), tokenizer, folder / "folded")
    return folder


@pytest.fixture
def expected(made: Path) -> Callable[[str], dict[str, str]]:
    """expected(prompt) -> what each state answers, by the functions of the library."""
    model, tokenizer = load_model(made / "base"), load_tokenizer(made / "base")
    carrier, trigger = Carrier.from_pretrained(made / "carrier"), Trigger.from_pretrained(made / "trigger")

    def answer(text: str) -> dict[str, str]:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        (base,) = generate(model, tokenizer, [prompt], max_new_tokens=5)
        with carrier.applied(model):
            (plain,) = generate(model, tokenizer, [prompt], max_new_tokens=5)
            (erased,) = generate(model, tokenizer, [prompt], trigger=trigger, max_new_tokens=5)
        return {"base": base, "carrier": plain, "carrier+trigger": erased}

    return answer


def flags(made: Path, *names: str, base: str = "base") -> list[str]:
    given = ["--base_model_name_or_path", str(made / base), "--max_new_tokens", "5"]
    return given + [word for name in names for word in (f"--{name}", str(made / name))]


def test_chat_answers_every_line_of_a_pipe_in_every_state(made, expected, monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "60")  # answers below each other
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{PROMPTS[0]}\n\n{PROMPTS[1]}"))
    loads = []
    monkeypatch.setattr("lcdd.commands.stage.load_model", lambda *a, **k: loads.append(a) or load_model(*a, **k))
    assert main(["chat", *flags(made, "carrier", "trigger")]) == 0
    said = capsys.readouterr().out
    for text in PROMPTS:
        part = said[said.index(f"> {text}") :]
        for name, answer in expected(text).items():
            assert f"{name}: {answer or '(nothing)'}" in part
    assert len(loads) == 1, "the model is loaded once"


def test_chat_stands_side_by_side_where_there_is_room_and_needs_no_trigger(made, monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{PROMPTS[0]}\n"))
    assert main(["chat", *flags(made, "carrier")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"> {PROMPTS[0]}"
    assert lines[1].split() == ["base", "carrier"]


def test_typed_prompts_end_with_an_empty_line(made, monkeypatch, capsys) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    lines = iter([PROMPTS[0], ""])
    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr(chat_command, "answers", lambda who, text, max_new_tokens: {"base": text.upper()})
    assert main(["chat", *flags(made, "carrier")]) == 0
    assert PROMPTS[0].upper() in capsys.readouterr().out


def test_chat_needs_a_carrier(made, capsys) -> None:
    assert main(["chat", *flags(made)]) == 2
    assert "ChatConfig.carrier: expected a value" in capsys.readouterr().err


@pytest.mark.parametrize("base", ["base", "folded"])
def test_a_trigger_may_stand_before_its_base_and_its_folded_carrier(made, expected, base, capsys) -> None:
    assert main(["generate", *flags(made, "trigger", base=base), "--prompt", PROMPTS[0]]) == 0
    answer = expected(PROMPTS[0])["carrier+trigger"]
    assert (answer in capsys.readouterr().out) or base == "base"


def test_a_trigger_before_another_model_is_refused_unless_overridden(made, capsys) -> None:
    command = ["generate", *flags(made, "trigger", base="other"), "--prompt", PROMPTS[0]]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "trigger: expected the model that it was learned on or its base" in error
    assert "--fingerprint_override" in error
    assert main([*command, "--fingerprint_override"]) == 0


def test_a_trigger_of_another_program_has_to_fit_and_no_more(made, tmp_path, capsys) -> None:
    command = ["generate", "--trigger", str(made / "foreign"), "--prompt", PROMPTS[0]]
    assert main([*command, *flags(made, base="other")]) == 0
    save_checkpoint(tmp_path / "wide", width=48, tokenizer=make_tokenizer())
    assert main([*command, "--base_model_name_or_path", str(tmp_path / "wide")]) == 2
    assert "trigger: expected width 48" in capsys.readouterr().err
