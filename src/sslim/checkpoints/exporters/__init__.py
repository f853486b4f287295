"""Exporters: a model written in a foreign layout that its reference implementation reads."""

from sslim.checkpoints.exporters.huggingface import export_huggingface
from sslim.checkpoints.exporters.melhubert import export_melhubert
from sslim.checkpoints.exporters.s3prl import export_s3prl

EXPORTERS = {"melhubert": export_melhubert, "huggingface": export_huggingface, "s3prl": export_s3prl}

__all__ = ["EXPORTERS", "export_huggingface", "export_melhubert", "export_s3prl"]
