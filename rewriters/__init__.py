"""The compiler: from an unmodified model to a graph that prunes its tokens. It knows no architecture by name.

Read ``regions/rewrite.py`` first (regions -> pruned model -> verification), then ``pipeline.py``, which calls the
stages for one region in order. Each stage is a folder: ``capture``, ``canonicalise``, ``detect``, ``plan``, ``insert``,
``lower`` and, at the end, ``verify``. ``graph`` holds what they all ask of nodes, and ``axes`` says how token axes move
through operations.
"""
