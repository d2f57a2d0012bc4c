"""The stage between capture and detection: one spelling for everything that later stages look for.

It takes a captured graph and changes it in place; values stay equal. Start at :data:`~rewriters.canonicalise.passes.PASSES`.
``attention*.py`` have the spellings of attention, which become one node. A pass that does not recognise what it looks for
leaves it alone and remembers why (``graph/match.py``).
"""
