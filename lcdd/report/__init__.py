"""report.json and its page: content, charts, tables, sentences."""

from lcdd.report.charts import heat_map, interval_bar, line_chart, reversal_map
from lcdd.report.content import assemble, read_report, thin, write_report
from lcdd.report.labels import label
from lcdd.report.numbers import number
from lcdd.report.page import render
from lcdd.report.progress import Bar, Stages, duration
from lcdd.report.rendering import style_sheet
from lcdd.report.statistics import auc, bootstrap_interval, newcombe_paired_interval, t975, wilson_interval
from lcdd.report.tables import (
    claims_table,
    closeness_table,
    markdown_table,
    paragraph,
    reversal_table,
    samples_table,
    terminal_width,
    text_table,
)
from lcdd.report.words import explain, verdict

__all__ = [
    "Bar",
    "Stages",
    "assemble",
    "auc",
    "bootstrap_interval",
    "claims_table",
    "closeness_table",
    "duration",
    "explain",
    "heat_map",
    "interval_bar",
    "label",
    "line_chart",
    "markdown_table",
    "newcombe_paired_interval",
    "number",
    "paragraph",
    "read_report",
    "render",
    "reversal_map",
    "reversal_table",
    "samples_table",
    "style_sheet",
    "t975",
    "terminal_width",
    "text_table",
    "thin",
    "verdict",
    "wilson_interval",
    "write_report",
]
