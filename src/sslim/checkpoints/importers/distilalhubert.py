"""DistilALHuBERT checkpoints: a stack of few layers that runs over and over, distilled from HuBERT.

Layout: ``alhubert`` with the tensors, ``Config.alhubert`` with the settings. Each layer is stored once; ``repeat_time`` says
how often the stack runs, 0, 1, 0, 1, and so on. A file of its own era also has tensors of a cross-entropy variant, which
nothing uses and which are dropped by name.

``Config.alhubert.normalize`` says that the student learnt from waveforms of zero mean and unit variance. The reference's own
feature extraction ignores it, so published features are those of waveforms as they are, and so are a loaded model's; the notes
say when the setting was on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sslim.checkpoints.importers import Imported
from sslim.checkpoints.importers.distilhubert import has_section, student_config, student_notes, student_settings
from sslim.checkpoints.importers.fairseq_names import native_state, tensors_of
from sslim.checkpoints.importers.hubert import padding_note
from sslim.models.distilhubert import MASK
from sslim.nn.heads import MaskEmbeddingConfig

WEIGHTS = SECTION = "alhubert"
LEFTOVERS = ("label_embs_concat", "final_proj.weight", "final_proj.bias")  # of a variant with cross-entropy
_DEFAULTS = {"encoder_layers": 1, "activation_dropout": 0.1}  # where AlhubertConfig differs from fairseq's HuBERT


def recognises(contents: Any) -> bool:
    """Whether a file's contents are a DistilALHuBERT checkpoint."""
    return has_section(contents, WEIGHTS, SECTION)


def convert(contents: Mapping[str, Any], source: str) -> Imported:
    """Translates a checkpoint.

    Args:
        contents: What ``read_pickle`` gives.
        source: The file's name, for errors.

    Raises:
        CheckpointError: A tensor nobody knows, or settings that are unknown or beyond what sslim computes.
    """
    weights = tensors_of(contents[WEIGHTS], source, WEIGHTS)
    settings = student_settings(contents, SECTION, source, _DEFAULTS)
    repeats = settings.count("repeat_time", 6)
    once = student_config(
        weights,
        settings,
        family="distilalhubert",
        normalize=False,
        projection_norm=True,
        heads={MASK: MaskEmbeddingConfig(dim=settings.count("encoder_embed_dim", 768))},
    )
    config = replace(once, encoder=replace(once.transformer, depth_map=once.transformer.depth_map * repeats))
    dropped = [name for name in LEFTOVERS if name in weights]
    notes = student_notes(contents) | ({"dropped": dropped} if dropped else {})
    if settings.boolean("normalize", False):
        notes["normalize"] = "trained on waveforms of zero mean and unit variance; taken as they are, as the reference extracts"
    notes["padding"] = padding_note(config.frontend)  # type: ignore[arg-type]
    state = native_state(
        weights,
        source,
        final_norm=config.transformer.final_norm,
        what="a DistilALHuBERT",
        others={"mask_emb": f"heads.{MASK}.embedding"},
        dropped=dropped,
    )
    return Imported(config=config, state=state, notes=notes)
