"""Probes: how much of a task can be read from frozen features, beside log-Mel and random weights in the same table."""

from sslim.probes.adapter import ForwardAdapter
from sslim.probes.classifiers import ClassifierConfig, Examples, ProbeClassifier
from sslim.probes.evaluate import NamedModel, ProbeConfig, probe
from sslim.probes.features import POOLINGS, Representation
from sslim.probes.fine_tuning import FineTuned, FineTuningConfig
from sslim.probes.protocol import Groups, Parts, SplitConfig, divide
from sslim.probes.published import PublishedConfig
from sslim.probes.result_card import card_table, read_card, write_card
from sslim.probes.selection import Fitted, fit, fit_leaving_out
from sslim.probes.tasks import TASKS, Task, load_task
from sslim.probes.tuned_files import read_tuned, write_tuned

__all__ = [
    "POOLINGS",
    "TASKS",
    "ClassifierConfig",
    "Examples",
    "FineTuned",
    "FineTuningConfig",
    "Fitted",
    "ForwardAdapter",
    "Groups",
    "NamedModel",
    "Parts",
    "ProbeClassifier",
    "ProbeConfig",
    "PublishedConfig",
    "Representation",
    "SplitConfig",
    "Task",
    "card_table",
    "divide",
    "fit",
    "fit_leaving_out",
    "load_task",
    "probe",
    "read_card",
    "read_tuned",
    "write_card",
    "write_tuned",
]
