"""One HTML page about runs, corpora and results; it needs no network, no script and no other file."""

from sslim.report.example import Example, load_example, save_example
from sslim.report.page import build_report, write_report

__all__ = ["Example", "build_report", "load_example", "save_example", "write_report"]
