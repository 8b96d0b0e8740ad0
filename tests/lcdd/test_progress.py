"""What a run tells: a live table on a terminal, plain lines elsewhere, estimates that follow the work."""

import io

import pytest
from rich.console import Console

from lcdd.report import Bar, Stages, duration, progress


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def shown(width: int = 60) -> str:
    text = io.StringIO()
    Console(file=text, width=width).print(progress._DISPLAY.render())
    return text.getvalue()


def test_in_a_pipe_a_long_bar_says_now_and_then_how_far_it_is(clock, capsys):
    with Bar(100, "train") as bar:
        for _ in range(50):
            clock.now += 2.0
            bar.update(shown={"loss": "0.5"})
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"train: {n}/100, {duration(2 * (100 - n))} left, loss 0.5" for n in (15, 30, 45)]


def test_short_work_and_hidden_bars_say_nothing(clock, capsys):
    with Bar(10, "a") as bar:
        clock.now += 20
        bar.update(10)
    with Bar(10, "b", hidden=True) as bar:
        clock.now += 200
        bar.update(10)
    assert capsys.readouterr().err == ""


def test_a_resumed_bar_estimates_by_what_it_did_itself(clock):
    bar = Bar(100, "train", done=90)
    with bar:
        clock.now += 10
        bar.update(5)
        assert str(bar) == "95/100, 10 s left"


def test_the_whole_is_estimated_by_the_work_of_the_stages(clock):
    stages = Stages({"sft": 1.0, "train": 3.0, "eval": 4.0})
    with stages:
        assert stages.left(0.0) is None
        with stages.running("sft"):
            clock.now += 10
        assert stages.seconds == {"sft": 10.0}
        assert stages.left(0.0) == pytest.approx(70)
        with stages.running("train"):
            clock.now += 15
            assert stages.left(0.5) == pytest.approx(25 * 5.5 / 2.5)


def test_stages_that_were_finished_before_do_not_count(clock):
    stages = Stages({"sft": 5.0, "train": 1.0, "eval": 1.0})
    with stages:
        stages.finished_before("sft", 99.0)
        with stages.running("train"):
            clock.now += 10
        assert stages.left(0.0) == pytest.approx(10)
        assert "✓ sft" in shown()
    assert stages.seconds == {"sft": 99.0, "train": 10.0}


def test_a_stage_that_fails_is_not_finished(clock):
    stages = Stages({"sft": 1.0})
    with pytest.raises(KeyError), stages, stages.running("sft"):
        raise KeyError("x")
    assert stages.seconds == {}
    assert progress._DISPLAY.stages is None


def test_a_terminal_shows_one_table_with_the_bar_and_the_estimate(clock, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    stages = Stages({"sft": 1.0, "train": 1.0})
    with stages:
        assert progress._DISPLAY.live is not None
        with stages.running("sft"):
            clock.now += 61
        with stages.running("train"), Bar(100, "lcdd", main=True) as bar:
            clock.now += 61
            bar.update(50, shown={"loss": "0.1234", "sparsity": "0.9"})
            with Bar(7, "answers"):
                text = shown()
            narrow = shown(width=40)
    lines = text.splitlines()
    assert lines[0].split() == ["✓", "sft", "1:01", "min"]
    assert lines[1].split() == ["▸", "train"]
    assert "50/100, 1:01 min left, loss 0.1234" in " ".join(text.split())
    assert "answers" in text
    assert "about 41 s left in all" in text
    assert max(map(len, narrow.splitlines())) <= 40
    assert progress._DISPLAY.live is None
    assert progress._DISPLAY.bars == []


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (185, "3:05 min"), (7800, "2:10 h")])
def test_durations(seconds, text):
    assert duration(seconds) == text
