"""The compiler: from an unmodified model to a graph that prunes its tokens.

Read ``pipeline.py`` first, then the stages in its order: ``capture``, ``canonicalise`` (with ``spellings``),
``detect`` (with ``special`` and ``propagate``), ``plan`` (with ``evaluate``), ``insert`` (with ``restoration``),
``pricing``, ``lift``, ``verify``. ``axes``, ``outcomes`` and ``rules`` say how token axes move through operations. Nothing here
knows any architecture by name.
"""
