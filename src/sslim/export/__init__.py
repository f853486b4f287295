"""Export: hidden states for other programs. (Checkpoints for other programs are ``sslim.checkpoints.exporters``.)"""

from sslim.export.representations import ExtractConfig, TooManyBadError, extract

__all__ = ["ExtractConfig", "TooManyBadError", "extract"]
