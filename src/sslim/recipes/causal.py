"""Recipes of causal MelHuBERT: the Transformer that can be streamed, trained to predict what comes next.

Autoregressive predictive coding with a causal Transformer is Chung and Glass, "Generative Pre-Training for Speech with
Autoregressive Predictive Coding" (arXiv 1910.12607). MelHuBERT's authors published such a model of some 45 million parameters,
whose training code is in none of their repositories; its positions look 64 frames ahead, and so it sees what it predicts. Here
attention, positions and normalisation see the past only (``sslim.models.causality``).

Masked prediction with a causal encoder runs too, as any recipe with ``model.encoder.causal`` set; it is no recipe here, because
a hidden frame is then guessed from one side of its span alone.
"""

from __future__ import annotations

from dataclasses import replace

from sslim.models import PRESETS
from sslim.models.causality import require_causal
from sslim.objectives import AutoregressiveConfig
from sslim.recipes.melhubert import melhubert_mini, melhubert_tiny
from sslim.recipes.pretrain import PretrainRecipe


def _predictive(name: str, about: str, size: str, like: PretrainRecipe, shift: int) -> PretrainRecipe:
    """A causal MelHuBERT without dropout or a head over clusters, trained as long and on the same batches as ``like``."""
    config = PRESETS[f"melhubert-causal-{size}"]()
    encoder = replace(config.transformer, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0)
    config = replace(config, encoder=encoder, heads={})
    require_causal(config)
    return PretrainRecipe(
        name=name,
        about=about,
        model=config,
        objective=AutoregressiveConfig(shift=shift),
        training=like.training,
        data=like.data,
    )


def apc_melhubert_mini() -> PretrainRecipe:
    """As melhubert-mini, but causal, and it predicts features 60 ms ahead instead of clusters of hidden frames.

    The features have the corpus's mean and variance: normalised for each utterance, they would know its future.
    """
    return _predictive(
        "apc-melhubert-mini",
        "own; 20 ms, 4 causal layers of width 192, 2 million parameters; 60 ms ahead; 8 minutes on one CPU core in bf16",
        "mini",
        melhubert_mini(),
        shift=3,
    )


def apc_melhubert_tiny() -> PretrainRecipe:
    """2 layers, 32 wide: seconds; for tests and for trying the commands."""
    return _predictive("apc-melhubert-tiny", "own; a smoke test of seconds", "tiny", melhubert_tiny(), shift=2)


RECIPES = {"apc-melhubert-mini": apc_melhubert_mini, "apc-melhubert-tiny": apc_melhubert_tiny}
