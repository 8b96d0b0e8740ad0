"""`lcdd compose`: several carriers of one base as one, and how far they meet."""

from itertools import combinations

from lcdd.carrier import Carrier, compose, overlap
from lcdd.checkpoint import require_new_directory
from lcdd.commands.stage import Say, StageResult, tell
from lcdd.config import ComposeConfig


def run(config: ComposeConfig, *, say: Say = tell) -> StageResult:
    """Write the sum of the carriers, minus those of `without`; a carrier like any other."""
    config.require("carriers", "output_dir")
    output = require_new_directory(str(config.output_dir))
    named = {name: Carrier.from_pretrained(name) for name in (*config.carriers, *config.without)}
    both = compose([*(named[name] for name in config.carriers), *(named[name].scaled(-1) for name in config.without)])
    for (name, first), (other, second) in combinations(named.items(), 2):
        met = overlap(first, second)
        say(
            f"{name} and {other}: {met['gates']:.1%} of their open gates in common, {met['entries']:.1%} of their "
            f"entries, cosine of their changes {met['cosine']:+.3f}"
        )
    folder = output / "carrier"
    both.save_pretrained(folder)
    say(f"{both.n_open:,} of {both.layout.n_gates:,} gates open")
    return StageResult(written=(folder,), next_step="")
