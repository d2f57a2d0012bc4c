"""Exchange left and right in a statement about two images: :func:`swap_sides`."""

from __future__ import annotations

from dataclasses import replace

from zoo.datasets.records import PairStatement, Sample

_OTHER = {"left": "right", "right": "left"}


def swap_sides(sample: Sample[PairStatement]) -> Sample[PairStatement]:
    """Exchange left and right, in the images and in the words, so that the label still holds.

    BLIP trains on half of the samples in this form.
    """
    record = sample.record
    words = [_OTHER.get(word, word) for word in record.statement.split(" ")]
    changed = replace(record, statement=" ".join(words), images=(record.images[1], record.images[0]))
    return Sample(changed, sample.images.flip(0))
