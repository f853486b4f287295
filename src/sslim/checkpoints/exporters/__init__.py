"""Exporters: a model written in a foreign layout that its reference implementation reads."""

from sslim.checkpoints.exporters.melhubert import export_melhubert

EXPORTERS = {"melhubert": export_melhubert}

__all__ = ["EXPORTERS", "export_melhubert"]
