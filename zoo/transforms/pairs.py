"""A statement about two images, turned round: :func:`turned_round`."""

from __future__ import annotations

from dataclasses import replace

from zoo.datasets.records import PairStatement, Sample

_OTHER = {"left": "right", "right": "left"}


def turned_round(sample: Sample[PairStatement]) -> Sample[PairStatement]:
    """Left and right exchanged, in the images and in the words, so that the label still holds.

    BLIP trains on half of the samples in this form.
    """
    record = sample.record
    words = [_OTHER.get(word, word) for word in record.statement.split(" ")]
    changed = replace(record, statement=" ".join(words), images=(record.images[1], record.images[0]))
    return Sample(changed, sample.images.flip(0))
