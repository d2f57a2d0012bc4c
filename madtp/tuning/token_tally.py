"""Means of how many tokens the sites keep: :class:`TokenTally`."""

from __future__ import annotations

from madtp.pruned import PrunedModel
from madtp.report import SiteTokens


class TokenTally:
    """Adds up what the sites of a model keep, call after call."""

    def __init__(self) -> None:
        self._samples: dict[str, int] = {}
        self._kept: dict[str, int] = {}
        self._before: dict[str, int] = {}

    def add(self, pruned: PrunedModel) -> None:
        """Take in the last forward."""
        counts = pruned.madtp.token_counts()
        lengths = pruned.madtp.token_lengths()
        for site, kept in counts.items():
            self._samples[site] = self._samples.get(site, 0) + len(kept)
            self._kept[site] = self._kept.get(site, 0) + int(kept.sum())
            self._before[site] = self._before.get(site, 0) + len(kept) * lengths[site]

    def means(self, pruned: PrunedModel) -> tuple[SiteTokens, ...]:
        """The means of each site that ran, in the order of the report."""
        return tuple(
            SiteTokens(site.name, self._before[site.name] / samples, self._kept[site.name] / samples)
            for site in pruned.madtp.report.sites
            if (samples := self._samples.get(site.name, 0))
        )
