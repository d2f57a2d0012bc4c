"""Tuning of a pruned model by sample batches, without labels: its strength, its counts, its alignment tokens.

Takes a pruned model and batches of inputs, and changes the model in place. Start at ``calibration.py``
(:func:`madtp.calibrate`); ``search.py`` is the search behind it, and ``time_search.py`` that for a saving of time.
``break_even.py`` tells what each site costs and saves. ``freezing.py`` fixes token counts (:func:`madtp.freeze`), and
``teaching.py`` trains the alignment tokens (:func:`madtp.teach`).
"""
