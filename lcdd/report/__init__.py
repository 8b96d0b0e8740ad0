"""report.json and its page: content, charts, tables, sentences."""

from lcdd.report.charts import heat_map, interval_bar, line_chart, number
from lcdd.report.content import read_report, render, thin, write_report
from lcdd.report.tables import claims_table, reversal_table
from lcdd.report.words import explain, samples_table

__all__ = [
    "claims_table",
    "explain",
    "heat_map",
    "interval_bar",
    "line_chart",
    "number",
    "read_report",
    "render",
    "reversal_table",
    "samples_table",
    "thin",
    "write_report",
]
