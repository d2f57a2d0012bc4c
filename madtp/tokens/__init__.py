"""What the slots of a pruned stream hold, and the operations of a rewritten graph that follow from it.

Takes tensors along the tokens of a stream together with its :class:`~madtp.tokens.state.TokenState`; gives what the original
operation gives, for the tokens that survived. Rewritten graphs call these functions, so their names appear in
``pruned.code()``.

Start at ``state.py``. A pruned stream has a padded form and a packed one (``packed_rows.py``); ``packing.py`` goes between
them. ``assembly.py`` makes the next state at a site. Attention over survivors is in ``attention.py`` and, for packed rows,
``packed_attention.py``; ``scored_attention.py`` also gathers what the importance needs. ``segments.py`` has ranges and
concatenations, ``grid.py`` blocks that need the grid, ``cached_tokens.py`` key/value caches.
"""

from madtp.tokens import cached_operations as cached_operations
