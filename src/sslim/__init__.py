"""sslim: pre-train, compress, probe and ship small self-supervised speech models.

``import sslim`` is light: torch is imported when ``load_model`` or ``save_model`` is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sslim.checkpoints import load_model, save_model

    __version__: str

__all__ = ["__version__", "load_model", "save_model"]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for."""
    if name in ("load_model", "save_model"):
        from sslim import checkpoints

        return getattr(checkpoints, name)
    if name == "__version__":
        from importlib.metadata import version

        return version("sslim")
    raise AttributeError(f"module 'sslim' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
