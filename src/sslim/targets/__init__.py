"""Frame targets: k-means codebooks, the labels they give, and how good those are."""

from __future__ import annotations

from sslim.targets.clustering import apply_codebook, cluster_corpus, make_vectors
from sslim.targets.kmeans import Codebook, KMeansConfig, KMeansState, fit
from sslim.targets.quality import label_quality, phone_measures
from sslim.targets.vectors import Vectors, model_digest

__all__ = [
    "Codebook",
    "KMeansConfig",
    "KMeansState",
    "Vectors",
    "apply_codebook",
    "cluster_corpus",
    "fit",
    "label_quality",
    "make_vectors",
    "model_digest",
    "phone_measures",
]
