"""The stage that finds residual streams, attention sublayers, modalities and readouts.

It takes a canonical graph and gives a :class:`~rewriters.detect.structure.Structure`, which also lists attention that fits
nowhere, and why. Nothing is changed. Start at :func:`rewriters.detect.streams.detect`.
"""
