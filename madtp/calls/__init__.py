"""Calls of a model: their arguments in a normal form, and the properties that decide which program serves them.

Takes the arguments that a user passes, and the objects among them (key/value caches); gives a
:class:`~madtp.calls.call.Call` of tensors and constants, its signature, and functions that compare results. Start at
``call.py``. ``objects.py`` flattens caches into tensors, ``packed_images.py`` splits calls into images, and
``image_positions.py`` and ``modality_tracking.py`` find where image features are in a text sequence.
"""
