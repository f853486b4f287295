"""``python -m sslim``: the same as the ``sslim`` command (``torchrun -m sslim pretrain ...`` needs it)."""

from __future__ import annotations

import sys

from sslim.cli import main

if __name__ == "__main__":
    sys.exit(main())
