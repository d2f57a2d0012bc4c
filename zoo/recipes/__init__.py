"""Training recipes of the zoo. A recipe module has `build` and `finish`; see :mod:`madtp.training.run`."""
