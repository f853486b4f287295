"""Importers: one file for each foreign format, with how to recognise it, a key table and a translation of its settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from sslim.models import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What an importer returns.

    Attributes:
        config: Description of the model.
        state: Its tensors by native name, copies that do not depend on the file.
        notes: Plain values for the model's provenance.
        undecided_subnet: For a supernet that does not say what its subnets are: what is missing, the rest of a sentence that
            begins with the file's name. Such a file loads only with the subnet's sizes spelt out.
    """

    config: ModelConfig
    state: dict[str, Tensor]
    notes: dict[str, Any] = field(default_factory=dict)
    undecided_subnet: str = ""
