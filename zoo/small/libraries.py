"""Imports the libraries that are installed, so that processes forked from one that imported this start at once."""

from __future__ import annotations

import contextlib
import importlib

for _name in ("timm", "transformers", "transformers.modeling_utils", "transformers.cache_utils", "open_clip"):
    with contextlib.suppress(ImportError):
        importlib.import_module(_name)
