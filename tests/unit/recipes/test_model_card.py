"""The model card: every step, every figure, what it was made from, and what to know."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from sslim import __version__
from sslim.compress.heads import HeadPruning, prune_heads
from sslim.compress.sharing import Sharing, share_layers
from sslim.compress.weights import WeightPruning, prune_weights
from sslim.frontends import NormalizationConfig
from sslim.models import SpeechModel, build_model
from sslim.models.hubert import hubert, narrow_conv_layers
from sslim.models.melhubert import melhubert
from sslim.models.storage import stored_as
from sslim.profiling import Conditions
from sslim.recipes.compression_table import row_of
from sslim.recipes.model_card import model_card

SMALL: Any = {"num_layers": 2, "dim": 32, "num_heads": 4, "feedforward_dim": 64, "conv_kernel_size": 16, "conv_groups": 4}
SOURCE = {"name": "models/teacher", "digest": "0123456789abcdef"}
CONDITIONS = Conditions(seconds=2.0)


def whole() -> SpeechModel:
    return build_model(melhubert(**SMALL), torch.Generator().manual_seed(0))


def card(model: SpeechModel, *, before: SpeechModel | None = None, **facts: Any) -> str:
    rows = [row_of("whole", before or whole(), CONDITIONS), {**row_of("01-cut", model, CONDITIONS), **facts}]
    return model_card("small", model, rows, SOURCE, None)


def test_steps_and_figures_are_told_in_order() -> None:
    small = prune_heads(whole(), HeadPruning(keep=0.5, score="l1-output"))
    small.provenance[-1]["budget"] = "params=20k"
    small.provenance.append(
        {
            "step": "distil",
            "recipe": "recovery",
            "loss": "layers",
            "teacher": {"name": "models/teacher", "family": "melhubert", "digest": "fedcba9876543210"},
            "corpus": "speech",
            "seed": 0,
            "steps": 300,
        }
    )
    told = card(small, budget={"told": "19,500 parameters, 2.5% below the budget of 20,000"}, latency_ms=3.0)
    count = f"{small.num_parameters(with_heads=False):,}"
    lines = told.splitlines()
    assert lines[0] == "# small"
    assert f"A melhubert model of 2 layers, 32 wide: {count} parameters without heads" in lines[2]
    assert (
        "1. **heads**: attention heads taken out (keep 0.5, scope layer, score l1-output, normalize 2, budget params=20k)"
        in lines
    )
    assert (
        "2. **distil**: trained to give what a teacher gives (recipe recovery, loss layers, teacher `models/teacher` "
        "(digest fedcba987654), corpus speech, seed 0, steps 300)" in lines
    )
    row = next(line for line in lines if line.startswith("| 01-cut"))
    share = small.num_parameters(with_heads=False) / whole().num_parameters(with_heads=False)
    assert f"| {count} ({share:.2f}) |" in row
    assert row.endswith("| 3.00 | 2 | 2 | 64 |")
    assert "- Model: `models/teacher` (digest 0123456789ab)" in lines
    assert "- Speech: none was looked at" in lines
    assert "- 01-cut: 19,500 parameters, 2.5% below the budget of 20,000." in lines
    assert f"Made with sslim {__version__}, torch {torch.__version__}" in told
    assert "removed_heads" not in told  # long lists are left to model.json


def test_zeros_are_explained_where_there_are_some() -> None:
    note = "Zeros are multiplied like any number: time does not change without a sparse kernel."
    assert f"- {note}" in card(prune_weights(whole(), WeightPruning(sparsity=0.5)))
    assert note not in card(prune_heads(whole(), HeadPruning(keep=0.5)))


def test_shared_blocks_are_counted() -> None:
    assert "of 2 layers from 1 blocks" in card(share_layers(whole(), Sharing(num_blocks=1)))


@pytest.mark.parametrize("kind", ["int8-weights", "fp16"])
def test_storage_is_told(kind: Any) -> None:
    told = card(stored_as(whole(), kind))
    assert f"- Weights are stored as {kind}: the model can be neither cut nor trained any more." in told


def test_statistics_are_told_or_missed() -> None:
    assert "give it some with `sslim import --statistics`" in card(whole())
    known = whole()
    known.set_statistics(torch.zeros(40), torch.ones(40), source="libri-960")
    assert "- Features are normalised with the mean and standard deviation of libri-960." in card(known)
    config = melhubert(**SMALL)
    assert config.frontend is not None
    frontend = replace(config.frontend, normalization=NormalizationConfig(kind="utterance", eps=1e-3))  # type: ignore[call-arg]
    assert "mean and standard deviation" not in card(build_model(replace(config, frontend=frontend)))


def test_imports_and_padding_rules_are_told() -> None:
    config = hubert(**SMALL, conv_layers=narrow_conv_layers(12))
    model = build_model(config, torch.Generator().manual_seed(0))
    model.provenance.append({"action": "import", "format": "HuBERT", "file": "base.pt", "step": 7, "settings": {"a": 1}})
    told = card(model, before=model)
    assert "1. **import**: read from a foreign checkpoint (format HuBERT, file base.pt, step 7)" in told
    assert "features do not depend on what an utterance is batched with" in told
    compatible = build_model(replace(config, frontend=replace(config.frontend, compat="reference")))  # type: ignore[type-var]
    assert "features depend on what an utterance is batched with" in card(compatible, before=model)
