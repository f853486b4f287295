"""Exporters: a model written in a foreign layout that its reference implementation reads."""

from sslim.checkpoints.exporters.huggingface import export_huggingface
from sslim.checkpoints.exporters.melhubert import export_melhubert

EXPORTERS = {"melhubert": export_melhubert, "huggingface": export_huggingface}

__all__ = ["EXPORTERS", "export_huggingface", "export_melhubert"]
