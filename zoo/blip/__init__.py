"""The BLIP family. `config.py` holds sizes, `nlvr.py` the model, `text.py` its text encoder."""
