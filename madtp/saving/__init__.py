"""Saved models: a pruned model goes to a folder of safetensors and JSON, and comes back.

Start at ``checkpoint.py``, which holds :func:`madtp.save` and :func:`madtp.load`. ``model_folder.py`` knows the files.
"""
