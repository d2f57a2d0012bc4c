"""Files that someone else may have written: what they may ask for, and readers that hold them to it.

``limits.py`` has the limits, ``json_text.py`` and ``tensors.py`` read JSON and safetensors within them.
"""
