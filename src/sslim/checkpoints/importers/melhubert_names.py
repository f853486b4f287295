"""The one table between MelHuBERT's tensor names (fairseq-like) and the native ones, used by importer and exporter."""

from __future__ import annotations

from sslim.checkpoints.importers.fairseq_names import ENCODER, MODERN_POSITIONS, POSITIONS, encoder_norm, translate, with_parts

_PAIRS = {  # foreign -> native
    "pre_extract_proj": "projection.linear",
    "final_proj": "heads.masked_prediction.linear",
}
_SINGLE = {
    "mask_emb": "heads.mask.embedding",
}


def _table(*, final_norm: bool) -> dict[str, str]:
    return with_parts(_PAIRS | ENCODER | encoder_norm(final_norm=final_norm)) | POSITIONS | _SINGLE


def native_name(name: str, *, final_norm: bool) -> str | None:
    """Returns the native name of a foreign one, or None; ``encoder.layer_norm`` is the final norm of pre-norm models only."""
    return translate(name, _table(final_norm=final_norm) | MODERN_POSITIONS)


def foreign_name(name: str, *, final_norm: bool) -> str | None:
    """Returns the foreign name (with classic weight norm) of a native one, or None."""
    return translate(name, {native: foreign for foreign, native in _table(final_norm=final_norm).items()})
