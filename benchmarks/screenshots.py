"""Pictures of a report as people see it: phone, desktop, dark and print, by headless Chromium.

    python -m benchmarks.screenshots runs/demo/report.html --output runs/screenshots

Written are phone.png (390 px), desktop.png (1280 px), dark.png and print.pdf, and printed is what can be said without
looking: whether anything has to be scrolled sideways, whether the first screen holds verdict and picture, and how many
pages the print has.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SIZES = {"phone": (390, 844), "desktop": (1280, 800)}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MEASURE = """
for (const [name, size] of Object.entries(SIZES)) {
  const frame = document.createElement("iframe");
  frame.width = size[0]; frame.height = size[1]; frame.srcdoc = PAGE;
  frame.onload = () => {
    const page = frame.contentDocument, root = page.documentElement;
    const bottom = (what) => { const e = page.querySelector(what); return e && e.getBoundingClientRect().bottom; };
    FOUND[name] = {sideways: root.scrollWidth - root.clientWidth, verdict: bottom("h1"), picture: bottom(".map")};
    document.getElementById("found").textContent = JSON.stringify(FOUND);
  };
  document.body.append(frame);
}
"""


@dataclass(frozen=True)
class Layout:
    """A page at one size, in pixels. sideways: that have to be scrolled; verdict, picture: where they end."""

    sideways: float
    verdict: float | None
    picture: float | None


def browser() -> str | None:
    """A Chromium that can be called, or None."""
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


def _run(*arguments: str) -> str:
    command = [str(browser()), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


def layouts(page: Path) -> dict[str, Layout]:
    """How the page lies at every size of `SIZES`."""
    html = json.dumps(page.read_text(encoding="utf-8")).replace("</", "<\\/")
    script = f"const SIZES = {json.dumps(SIZES)}, PAGE = {html}, FOUND = {{}};{MEASURE}"
    with tempfile.TemporaryDirectory() as folder:
        outer = Path(folder) / "outer.html"
        outer.write_text(f'<!doctype html><meta charset="utf-8"><body><pre id="found"></pre><script>{script}</script>')
        dom = _run("--virtual-time-budget=10000", "--dump-dom", outer.as_uri())
    found = re.search(r'<pre id="found">(.*?)</pre>', dom, flags=re.DOTALL)
    if found is None or not found[1]:
        raise RuntimeError(f"the browser measured nothing: {dom[-500:]}")
    return {name: Layout(**row) for name, row in json.loads(found[1]).items()}


def print_pages(page: Path, pdf: Path) -> int:
    """Print the page; how many sheets it takes."""
    _run("--no-pdf-header-footer", f"--print-to-pdf={pdf}", page.resolve().as_uri())
    return len(re.findall(rb"/Type\s*/Page\b", pdf.read_bytes()))


def screenshots(page: Path, output: Path) -> None:
    """The first screens, the whole page in dark."""
    for name, (width, height) in SIZES.items():
        _run(f"--window-size={width},{height}", f"--screenshot={output / name}.png", page.resolve().as_uri())
    dark = ("--blink-settings=preferredColorScheme=0", "--window-size=1280,2400")
    _run(*dark, f"--screenshot={output / 'dark'}.png", page.resolve().as_uri())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("report", type=Path, help="report.html of a run")
    parser.add_argument("--output", type=Path, default=Path("runs/screenshots"))
    arguments = parser.parse_args(argv)
    if browser() is None:
        print(f"screenshots: expected one of {', '.join(BROWSERS)} on the PATH, found none", file=sys.stderr)
        return 2
    arguments.output.mkdir(parents=True, exist_ok=True)
    screenshots(arguments.report, arguments.output)
    for name, found in layouts(arguments.report).items():
        print(f"{name} {SIZES[name]}: {found}")
    print(f"print: {print_pages(arguments.report, arguments.output / 'print.pdf')} pages")
    print(f"wrote {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
