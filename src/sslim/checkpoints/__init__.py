"""Checkpoints: the native folder (safetensors and JSON), the restricted reader of foreign files, importers and exporters."""

from sslim.checkpoints.loading import IMPORTERS, Importer, load_model
from sslim.checkpoints.native import FORMAT_VERSION, save_model
from sslim.checkpoints.pickle_values import Placeholder
from sslim.checkpoints.restricted_pickle import CheckpointError, read_pickle

__all__ = [
    "FORMAT_VERSION",
    "IMPORTERS",
    "CheckpointError",
    "Importer",
    "Placeholder",
    "load_model",
    "read_pickle",
    "save_model",
]
