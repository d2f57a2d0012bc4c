"""What the slots of a pruned stream hold, and the operations of a rewritten graph that follow from it.

Takes tensors along the tokens of a stream together with its :class:`~madtp.tokens.state.TokenState`; gives what the original
operation gives, for the tokens that survived. Rewritten graphs call these functions, so their names appear in
``pruned.code()``.

Start at ``state.py``. ``assembly.py`` makes the next state at a site; ``attention.py`` is attention over survivors;
``segments.py`` has ranges and concatenations, ``grid.py`` blocks that need the grid, ``cache_marks.py`` key/value caches.
"""
