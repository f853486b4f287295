"""What a model costs: multiply-accumulates by analysis, latency by measurement."""

from sslim.profiling.latency import Conditions, LatencyTable, measure_latency
from sslim.profiling.macs import Macs, count_macs

__all__ = ["Conditions", "LatencyTable", "Macs", "count_macs", "measure_latency"]
