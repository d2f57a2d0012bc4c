"""Files that someone else may have written: what they may ask for, and readers that hold them to it.

``limits.py`` has the limits, ``json_text.py``, ``tensors.py`` and ``images.py`` read JSON, safetensors and images within
them.
"""
