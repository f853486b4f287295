"""One HTML page about runs, corpora and results; it needs no network, no script and no other file."""

from sslim.report.example import Example, load_example, save_example
from sslim.report.page import build_report, write_report
from sslim.report.restoration import Restoration, load_restoration, save_restoration

__all__ = [
    "Example",
    "Restoration",
    "build_report",
    "load_example",
    "load_restoration",
    "save_example",
    "save_restoration",
    "write_report",
]
