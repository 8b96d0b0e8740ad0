"""The report as a browser lays it out: no sideways scrolling, verdict and picture on the first screen, a short print.

Compared is structure, not pixels. Skipped, with the reason, where there is no Chromium.
"""

from pathlib import Path

import pytest
from reports import rates, run_report

from benchmarks.screenshots import SIZES, browser, layouts, print_pages, screenshots
from lcdd.models import GROUPS
from lcdd.report import explain, write_report

pytestmark = pytest.mark.skipif(browser() is None, reason="no Chromium on the PATH (apt-get install chromium)")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with everything a run can have, long names and answers, and thirty layers."""
    folder = tmp_path_factory.mktemp("page")
    report = run_report()
    states = [*report["models"], "carrier+trigger_random_channels", "carrier+trigger_kl_only"]
    report["models"] |= {name: rates(0.3, 0.4) for name in states if name not in report["models"]}
    report["samples"] = [
        {"prompt": "Why " * 20, "answers": {name: f"{name} because " * 8 for name in states}} for _ in range(8)
    ]
    report["sparsity_by_layer"] = [dict.fromkeys(GROUPS, 0.9)] * 30
    report["curves"] = [
        {"stage": "lcdd", "step": i, "loss": 0.1, "ema": 0.1, "epsilon": 0.2, "dual_lambda": 0.01, "sparsity": i / 200}
        for i in range(200)
    ]
    report["curves"] += [
        {"stage": name, "step": i, "loss": 1.0, "tail_kl": 1.0, "validation_loss": 2.0 / (i + 1)}
        for name in states[3:]
        for i in range(50)
    ]
    report |= {"behavior": "fixed_response", "seed": 0, "split": "test", "config": {"train": {"x" * 300: 1}}}
    report["use"] = {name: f"runs/{'long-name-' * 9}" for name in ("base_model_name_or_path", "carrier", "trigger")}
    report["explanation"] = explain(report)
    write_report(folder, report)
    return folder / "report.html"


def test_nothing_is_scrolled_sideways_and_the_first_screen_has_verdict_and_picture(page):
    found = layouts(page)
    assert set(found) == set(SIZES)
    for name, layout in found.items():
        assert layout.sideways == 0, name
        assert 0 < layout.verdict < layout.picture < SIZES[name][1], name


def test_the_print_is_short_and_the_pictures_are_made(page, tmp_path):
    assert 1 <= print_pages(page, tmp_path / "print.pdf") <= 4
    screenshots(page, tmp_path)
    for name in ("phone", "desktop", "dark"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5_000
