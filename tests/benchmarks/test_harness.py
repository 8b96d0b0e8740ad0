"""The benchmark harness: its gate, its rounds, its memory counts, its records; and the GPU's list, on the CPU."""

import gc
import json
import weakref
from types import SimpleNamespace

import pytest
import torch

from benchmarks import compare, harness, plot, records, run
from benchmarks.cases import Place, losses, shapes, single, steps, suite
from benchmarks.goals import GOALS, Goal
from benchmarks.harness import Case, Check, Cost, Lane, Roof, Sample, Workload, rounds, samples_of
from fixtures.gates import gate_logits

TINY = Place(device=torch.device("cpu"), size="tiny")


class Steps:
    """A clock on which the runs take the times they are given."""

    def seconds(self, function):
        return function()


def work(*times, **more):
    supply = iter(times)
    return Workload(run=lambda: next(supply), **more)


def quick(monkeypatch, tmp_path, cases, *more):
    """Exit code of a run over these cases, and what it wrote."""
    monkeypatch.setattr(run, "suite", lambda place, gpu_list: cases)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    code = run.main(["--size", "tiny", "--effort", "0.001", "--results", str(tmp_path), *more])
    return code, [row for path in tmp_path.glob("*/records.csv") for row in records.load(path)]


# --- rounds and metrics -----------------------------------------------------------------------------------------------


def test_rounds_interleave_and_ratios_are_paired():
    """A machine that slows down in the second round leaves the ratio alone."""
    order = []

    def lane(name, *times):
        supply = iter(times)

        def go():
            order.append(name)
            return next(supply)

        return Workload(run=go, tokens=6, cost=Cost(bytes=12e9, flops=2e12))

    lanes = {"floor": lane("floor", 1.0, 10.0, 1.0), "ours": lane("ours", 0.5, 5.0, 0.5)}
    times = rounds(lanes, Steps(), budget_s=0.0, min_rounds=3, warmup_s=0.0)
    assert order == ["floor", "ours", "ours", "floor", "floor", "ours"]
    found = samples_of(times, lanes, floor="floor", roof=Roof(bandwidth=24e9, rate=4e12))
    ours = {s.metric: s for s in found["ours"]}
    assert (ours["ratio"].p20, ours["ratio"].p50, ours["ratio"].p80, ours["ratio"].n) == (0.5, 0.5, 0.5, 3)
    assert ours["time"].p50 == 0.5
    assert ours["tokens_per_second"].p50 == 12
    assert ours["bandwidth"].p50 == 24
    assert ours["rate"].p50 == 4
    assert ours["roof"].p50 == 1.0
    assert "ratio" not in {s.metric for s in found["floor"]}


def test_warm_up_runs_are_not_counted_and_inputs_are_fresh():
    drawn = []
    lane = Workload(run=lambda: 1.0, fresh=lambda: drawn.append(1))
    times = rounds({"a": lane}, Steps(), budget_s=0.0, min_rounds=4, warmup_s=1e-9)
    assert len(times["a"]) == 4
    assert len(drawn) >= 5
    assert rounds({}, Steps(), budget_s=0.0) == {}  # no lane fitted into memory


def test_cpu_clock_repeats_what_is_short():
    calls = []
    clock = harness.CPUClock()
    first = clock.seconds(lambda: None)
    assert first >= 0

    def short():
        calls.append(1)

    clock.seconds(short)
    clock.seconds(short)
    assert len(calls) > 2


class FakeCUDA:
    """Stands for torch.cuda in the clock and the graph: records what was called in what order."""

    def __init__(self, monkeypatch):
        self.calls = []
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1 << 10))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *a: self.calls.append("synchronize"))
        monkeypatch.setattr(torch.cuda, "Event", self.event)
        monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(wait_stream=lambda other: None))
        monkeypatch.setattr(
            torch.cuda, "current_stream", lambda: SimpleNamespace(wait_stream=lambda other: self.calls.append("wait"))
        )
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
        monkeypatch.setattr(torch.cuda, "graph", lambda graph: self.context("graph"))
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: self.context("stream"))

    def event(self, enable_timing):
        assert enable_timing
        return SimpleNamespace(record=lambda: self.calls.append("record"), elapsed_time=lambda end: 2.0)

    def context(self, name):
        import contextlib

        self.calls.append(name)
        return contextlib.nullcontext()


def test_cuda_clock_times_one_run_between_events(monkeypatch):
    fake = FakeCUDA(monkeypatch)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(16, dtype=torch.int32))
    clock = harness.CUDAClock(torch.device("cuda"))
    assert clock.seconds(lambda: fake.calls.append("run")) == pytest.approx(2e-3)
    assert fake.calls == ["record", "run", "record", "synchronize"]
    replay = harness.captured(lambda: fake.calls.append("captured"))
    assert fake.calls[4:] == ["stream", "captured", "wait", "graph", "captured"]
    assert replay() is None


# --- the gate ---------------------------------------------------------------------------------------------------------


def broken_linear_case(monkeypatch):
    """A real case whose provider is broken on purpose: the packed gradient comes out a little too large."""
    from lcdd.optimizer import packed

    right = packed.packed_weight_grad
    monkeypatch.setattr(packed, "packed_weight_grad", lambda x, dy, *a, **k: right(x, dy * 1.01, *a, **k))
    return single.packed_linears(TINY)[0]


def test_a_broken_provider_is_not_timed_and_the_run_fails(monkeypatch, tmp_path, capsys):
    code, rows = quick(monkeypatch, tmp_path, [broken_linear_case(monkeypatch)])
    shown = capsys.readouterr()
    assert code == 1
    assert rows == []
    assert "WRONG RESULT" in shown.err
    assert "of the floor" not in shown.out


def test_the_same_case_unbroken_passes(monkeypatch, tmp_path, capsys):
    code, rows = quick(monkeypatch, tmp_path, [single.packed_linears(TINY)[0]])
    assert code == 0
    assert {row.metric for row in rows} >= {"time", "ratio", "tokens_per_second", "first_run"}
    assert "of the floor" in capsys.readouterr().out


@pytest.mark.parametrize("error", [float("nan"), float("inf"), 2.0])
def test_check_fails_on(error):
    assert not Check("x", error, 1.0).ok


def test_a_gate_that_checks_nothing_fails(monkeypatch, tmp_path):
    lane = Lane(provider="lcdd", build=lambda: work(), verify=list)
    code, rows = quick(monkeypatch, tmp_path, [Case(name="empty", params={}, lanes=[lane])])
    assert code == 1
    assert rows == []


def test_a_case_that_raises_fails_the_run_and_leaves_the_others(monkeypatch, tmp_path, capsys):
    def fail():
        raise RuntimeError("no such luck")

    bad = Case(name="bad", params={}, lanes=[Lane(provider="plain", build=fail, exempt="test")])
    good = Case(name="good", params={}, lanes=[Lane(provider="plain", build=lambda: work_forever(), exempt="test")])
    code, rows = quick(monkeypatch, tmp_path, [bad, good])
    assert code == 1
    assert {row.case for row in rows} == {"good"}
    assert "no such luck" in capsys.readouterr().err


def work_forever():
    return Workload(run=lambda: None)


def test_a_time_limit_says_what_it_left_out(monkeypatch, tmp_path, capsys):
    cases = [
        Case(name=name, params={}, lanes=[Lane(provider="plain", build=work_forever, exempt="test")])
        for name in ("first", "second")
    ]
    code, rows = quick(monkeypatch, tmp_path, cases, "--time-limit", "0")
    assert (code, rows) == (0, [])
    assert "not run: first, second" in capsys.readouterr().out


def test_bad_lanes_are_refused():
    with pytest.raises(ValueError, match="provider"):
        Lane(provider="ours", build=work_forever, exempt="x")
    with pytest.raises(ValueError, match="verify"):
        Lane(provider="lcdd", build=work_forever)
    lane = Lane(provider="plain", build=work_forever, exempt="x")
    with pytest.raises(ValueError, match="distinct"):
        Case(name="x", params={}, lanes=[lane, lane])


# --- memory -----------------------------------------------------------------------------------------------------------


def test_a_clock_keeps_no_workload_alive():
    class Model:
        def step(self):
            pass

    clock, model = harness.CPUClock(), Model()
    work = Workload(run=model.step)
    clock.seconds(work.run)
    alive = weakref.ref(model)
    del model, work
    gc.collect()
    assert alive() is None


def test_held_for_backward_counts_each_storage_once_and_no_weight():
    weight = torch.ones(100, 100, requires_grad=True)
    x = torch.ones(10, 100, requires_grad=True)
    with harness.held_for_backward([weight]) as tally:
        y = (x @ weight).exp()
        (y * y).sum().backward()
    # x (10 x 100) for the weight's gradient and y (10 x 100) for exp's and the square's
    assert tally.peak == 2 * 10 * 100 * 4
    del y
    assert tally.bytes == 0


def test_memory_of_a_lane_sees_what_it_allocates():
    def build():
        kept = torch.ones(1 << 20)
        return Workload(run=lambda: torch.ones(8 << 20).sum() + kept.sum())

    lane = Lane(provider="plain", build=build, exempt="test")
    before = harness.resident_bytes(torch.device("cpu"))
    found = harness.memory_of(lane, torch.device("cpu"), before=before)
    assert found["peak_memory"] > 0.9 * (8 << 22)
    assert found["held_for_backward"] == 0


def test_memory_is_measured_in_a_process_of_its_own(monkeypatch, tmp_path):
    case = losses.cross_entropy(TINY)
    seen = []

    def child(command, **_):
        seen.append(command)
        return SimpleNamespace(returncode=0, stdout='noise\n{"peak_memory": 7.0}\n', stderr="")

    monkeypatch.setattr(run.subprocess, "run", child)
    runner = run.Runner(run.build_parser().parse_args(["--results", str(tmp_path)]), TINY, "cpu")
    assert [s.p50 for s in runner.memory(case, case.lanes[1])] == [7.0]
    name, label = seen[-1][seen[-1].index("--probe") + 1 :]
    monkeypatch.undo()
    assert run.probe([case], [name, label], torch.device("cpu")) == 0


# --- records, tables, pictures ----------------------------------------------------------------------------------------


def environment(device="Some CPU, 2 cores"):
    return records.Environment(device=device, threads=2, torch="2", triton="3", python="3.11", commit="abc")


def tax_rows(ratio=1.05):
    params = {
        "model": "qwen3-0.6b, ÷2, 4 layers", "gates": "hard_concrete", "micro_batches": 4, "tokens": 256,
        "dtype": "float32", "checkpointing": False,
    }  # fmt: skip
    lanes = [
        Lane(provider="lcdd", build=work_forever, params={"density": d}, exempt="x") for d in (1.0, 0.5, 0.2, 0.15)
    ]
    case = Case(name="optimizer step", params=params, lanes=lanes)
    samples = [Sample.of("time", "s", [0.25, 0.25]), Sample.of("ratio", "x", [ratio, ratio])]
    return [environment().row(case, lane, s, clock_mhz=1.0) for lane in lanes for s in samples]


def test_records_survive_a_round_trip_and_merge(tmp_path):
    path = tmp_path / "device" / "records.csv"
    records.save(path, tax_rows())
    assert records.load(path) == tax_rows()
    other = Case(name="gates", params={}, lanes=[Lane(provider="lcdd", build=work_forever, exempt="x")])
    records.save(path, [environment().row(other, other.lanes[0], Sample.of("time", "s", [1.0]), clock_mhz=0.0)])
    records.save(path, tax_rows(ratio=0.9)[:2])  # the case was run again, with one lane
    assert [(row.case, row.p50) for row in records.load(path)] == [
        ("gates", 1.0), ("optimizer step", 0.25), ("optimizer step", 0.9),
    ]  # fmt: skip


def test_two_commits_side_by_side_show_times_and_ratios_to_each_run_s_own_floor(capsys):
    compare._print(tax_rows(1.05), tax_rows(0.9) + tax_rows(0.8))
    first = capsys.readouterr().out.splitlines()[-4]
    assert first.split()[:5] == ["250.000", "250.000", "1.000", "1.050", "0.850"]
    assert '{"density": 1.0}' in first


def test_tables_and_picture_come_from_the_records(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- records: begin -->\nold 123.456\n<!-- records: end -->\nafter\n")
    records.save(tmp_path / "results" / "some-cpu" / "records.csv", tax_rows(1.05))
    written = plot.refresh(results=tmp_path / "results", readme=readme)
    text = readme.read_text()
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert "old 123.456" not in text
    assert "1.050 (1.050–1.050)" in text
    assert "| tax of open gates, 4 micro-batches | ≤ 1.15 | 1.05 | yes |" in text
    assert "| tax at 80% closed, hard-concrete, 4 micro-batches | ≤ 0.95 | 1.05 | **no** |" in text
    assert "Not measured yet, goals only" in text
    assert "| an LCDD step with every gate open, over a plain fine-tuning step | **1.05** |" in text
    assert text.index("plain fine-tuning step") < text.index(".svg") < text.index("<details>")
    assert text.count("<details>") == text.count("</details>") == 3
    picture = next(path for path in written if path.suffix == ".svg").read_text()
    assert "the floor" in picture
    assert picture.count("<circle") == 4 + 1
    assert not plot.unmeasured_goals({"cpu", "cuda"})


def test_a_goal_can_be_a_time_over_another_lanes():
    lanes = [Lane(provider=p, build=work_forever, exempt="x") for p in ("unfused", "lcdd")]
    case = Case(name="c", params={}, lanes=lanes)
    rows = [
        environment().row(case, lane, Sample.of("time", "s", [t]), clock_mhz=0)
        for lane, t in zip(lanes, (3.0, 1.0), strict=True)
    ]
    goal = Goal(text="", device="cpu", case="c", provider="lcdd", limit=0.5, over=("unfused", {}))
    assert goal.values(rows) == [pytest.approx(1 / 3)]
    assert goal.holds(1 / 3)


def test_every_goal_is_about_a_case_that_is_run():
    names = {False: set(), True: set()}
    for gpu in (False, True):
        place = Place(device=torch.device("cpu"), size="gpu" if gpu else "cpu")
        for case in suite(place, gpu_list=gpu):
            for lane in case.lanes:
                names[gpu].add(
                    (case.name, lane.provider.split(":")[0], json.dumps([dict(case.params), dict(lane.params)]))
                )
    for goal in GOALS:
        case_names = names[goal.device == "cuda"]
        rows = [
            SimpleNamespace(case=name, provider=provider, metric="time" if goal.over else goal.metric, p50=1.0,
                            params=json.dumps(json.loads(both)[0]), lane=json.dumps(json.loads(both)[1]))
            for name, provider, both in case_names
        ]  # fmt: skip
        assert goal.values(rows), goal.text


# --- shapes and the lists ---------------------------------------------------------------------------------------------


def test_scaled_models_keep_their_proportions():
    from lcdd.models import Architecture, skeleton_of

    def share(sizes):
        model = Architecture.of(skeleton_of(sizes))
        return model.vocab_size * model.width / model.masked_parameters, model.masked_parameters

    whole, n = share(shapes.sizes_of("qwen3-0.6b"))
    small, _ = share(shapes.sizes_of("qwen3-0.6b", layers=4, divide=2))
    assert n == 440_401_920
    assert small == pytest.approx(whole, rel=1e-3)


def test_gate_logits_open_the_density_asked_for():
    from lcdd.models import layout_of

    model = shapes.make_model(shapes.tiny_sizes("qwen3-0.6b"), TINY, seed=0)
    logits = gate_logits(model, 0.25)
    layout = layout_of(model)
    for start, stop in zip(layout.offsets[:-1].tolist(), layout.offsets[1:].tolist(), strict=True):
        assert int((logits[start:stop] > 0).sum()) == round(0.25 * (stop - start))


@pytest.mark.parametrize("kind", steps.KINDS)
def test_a_wrong_optimizer_step_does_not_pass_the_gate(kind, monkeypatch):
    case = steps.step_case(TINY, "qwen3-0.6b", layers=2, divide=1, tokens=16, micro=2, kind=kind, densities=(0.5,))
    (lane,) = [lane for lane in case.lanes if lane.provider == "lcdd"]
    assert all(check.ok for check in lane.verify())
    from lcdd.optimizer import Gates

    right = Gates.logits_grad
    monkeypatch.setattr(Gates, "logits_grad", lambda self, d, *, l0_weight: right(self, d, l0_weight=1.1 * l0_weight))
    failed = {check.name for check in lane.verify() if not check.ok}
    assert failed == {"movement of theta"}


def test_the_gpu_list_runs_from_end_to_end(monkeypatch, tmp_path, capsys):
    """Every case of `make gpu`, tiny and on the CPU, gates and records included; memory in this process."""

    def here(self, case, lane):
        found = harness.memory_of(lane, TINY.device, before=0) if lane is case.lanes[-1] else {}
        return [Sample.of(name, "bytes", [value]) for name, value in found.items()]

    monkeypatch.setattr(run.Runner, "memory", here)
    unique: dict[str, Case] = {}
    for case in suite(TINY, gpu_list=True):
        unique.setdefault(run.identity(case), case)  # sizes apart, many are one case
    cases = [
        Case(name=c.name, params=c.params, lanes=c.lanes, floor=c.floor, memory=c.memory, min_rounds=1, budget_s=0.0,
             warmup_s=1e-9)
        for c in unique.values()
    ]  # fmt: skip
    code, rows = quick(monkeypatch, tmp_path, cases, "--list", "gpu")
    assert code == 0, capsys.readouterr().err
    assert {row.case for row in rows} == {case.name for case in cases}
