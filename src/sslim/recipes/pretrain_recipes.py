"""All recipes of ``sslim pretrain`` by name."""

from __future__ import annotations

from collections.abc import Callable

from sslim.recipes import apc, causal, hubert, melhubert, reconstruction
from sslim.recipes.pretrain import PretrainRecipe

RECIPES: dict[str, Callable[[], PretrainRecipe]] = {
    **melhubert.RECIPES,
    **hubert.RECIPES,
    **apc.RECIPES,
    **causal.RECIPES,
    **reconstruction.RECIPES,
}
