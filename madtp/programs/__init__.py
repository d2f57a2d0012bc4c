"""Programs: rewritten graphs that are compiled, cached by call signature, and run in the place of a module's own forward.

Takes the graphs that the compiler hands over, as :class:`~madtp.programs.program.Program`, and gives the ``forward`` of the
pruned model and of its regions. Start at ``program.py``. ``program_cache.py`` finds the program for a call, ``region.py``,
``packed_images_region.py``, ``chain.py`` and ``host_forward.py`` put programs in the place of forwards, and
``gradient_checkpointing.py`` and ``single_sample.py`` are two other ways to run a program.
"""
