"""`lcdd report`: report.html again from report.json."""

from pathlib import Path

from lcdd.commands.reporting import open_page
from lcdd.commands.stage import Say, StageResult, tell
from lcdd.config import ReportConfig
from lcdd.errors import InputError
from lcdd.report import claims_table, closeness_table, read_report, reversal_table, write_report


def report(config: ReportConfig, *, say: Say = tell) -> StageResult:
    """Render report.html again from report.json."""
    config.require("output_dir")
    output = Path(str(config.output_dir))
    content = read_report(output)
    tables = [make(content[key]) for key, make in (("audit", claims_table),) if key in content]
    tables += [reversal_table(content)] if "models" in content else []
    tables += [nearness] if (nearness := closeness_table(content)) else []
    if not tables:
        raise InputError(
            f"output_dir: expected the report of an evaluation or an audit in {str(output)!r}, got another"
        )
    write_report(output, content)
    for table in tables:
        say(table)
    return StageResult(written=(output / "report.html",), next_step=open_page(output))
