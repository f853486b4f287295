"""Which models see no more of the future than a fixed number of samples, and what is in the way of the others.

Causal attention is not enough: MelHuBERT's reference has it, but convolutional positions that look 64 frames ahead. Here every
part counts. A front-end's window and a stack of frames need the samples under them; they make a frame come late, by a time that
is known (``audio.longest_wait``), and let nothing else through. Normalisation over an utterance lets everything through: each
frame then depends on samples that are still to come.
"""

from __future__ import annotations

from sslim.frontends.streaming import whole_utterance_needed
from sslim.models.speech import ModelConfig


def future_seen(config: ModelConfig) -> str | None:
    """Returns what lets a model's frames depend on more than the samples under them, as half a sentence; None for nothing.

    Args:
        config: The model. One without a front-end sees only features, which are taken as they come.
    """
    encoder = config.encoder
    if not encoder.causal:
        return f"its {encoder.kind} encoder is not causal: a frame depends on later ones"
    if config.chunking is not None and config.chunking.compat is not None:
        return "long inputs are cut by their length (chunking.compat 'reference'); expected None"
    return None if config.frontend is None else whole_utterance_needed(config.frontend)


def require_causal(config: ModelConfig) -> None:
    """Raises ValueError, with what is in the way, unless a model's frames depend on no later samples than those under them."""
    if (reason := future_seen(config)) is not None:
        raise ValueError(f"this {config.family} model cannot be streamed: {reason}")
