"""The way of every trace, counted: how many reached each filter, how many it dropped and why, source by source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class SourceCounts:
    """What one filter did with one source's traces."""

    num_in: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    @property
    def num_kept(self) -> int:
        """Those that went on."""
        return self.num_in - self.dropped.total()


@dataclass
class FilterCounts:
    """What one filter did; every number is a sum over sources, so that in = kept + dropped by construction."""

    name: str
    sources: dict[str, SourceCounts] = field(default_factory=dict)

    def count(self, source: str, reason: str | None, number: int = 1) -> None:
        """`number` traces of `source` came, and went for `reason` or stayed (None)."""
        counts = self.sources.setdefault(source, SourceCounts())
        counts.num_in += number
        if reason is not None:
            counts.dropped[reason] += number

    @property
    def num_in(self) -> int:
        """Traces that reached the filter."""
        return sum(counts.num_in for counts in self.sources.values())

    @property
    def dropped(self) -> Counter[str]:
        """Traces that it dropped, by reason."""
        return sum((counts.dropped for counts in self.sources.values()), Counter())

    @property
    def num_kept(self) -> int:
        """Traces that went on."""
        return self.num_in - self.dropped.total()


class FunnelError(RuntimeError):
    """Traces were lost or made between two filters."""


@dataclass
class Funnel:
    """Filters in the order in which traces went through them."""

    filters: list[FilterCounts] = field(default_factory=list)

    def check(self, num_in: int, num_kept: int) -> None:
        """FunnelError unless what one filter keeps reaches the next, and the ends are `num_in` and `num_kept`.

        A source that reaches a filter is one that the filter before it kept something of.
        """
        reached = num_in
        for counts in self.filters:
            if counts.num_in != reached:
                raise FunnelError(f"{reached} traces should have reached {counts.name}, and {counts.num_in} did")
            reached = counts.num_kept
        if reached != num_kept:
            raise FunnelError(f"the last filter kept {reached} traces, and {num_kept} were written")

    @property
    def sources(self) -> list[str]:
        """All sources, in the order in which they were first seen."""
        return list(dict.fromkeys(source for counts in self.filters for source in counts.sources))

    def of_source(self, source: str) -> list[tuple[str, SourceCounts]]:
        """(filter, counts) of one source."""
        return [(counts.name, counts.sources.get(source, SourceCounts())) for counts in self.filters]

    def to_dict(self) -> dict[str, Any]:
        """As it is written to funnel.json; reasons by falling number."""
        return {
            "num_in": self.filters[0].num_in if self.filters else 0,
            "num_kept": self.filters[-1].num_kept if self.filters else 0,
            "filters": [
                {
                    "name": counts.name,
                    **_numbers(counts),
                    "sources": {s: _numbers(c) for s, c in counts.sources.items()},
                }
                for counts in self.filters
            ],
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Funnel:
        """What `to_dict` made."""
        return cls([_filter(item["name"], item["sources"].items()) for item in value["filters"]])


def gathered(sources: Mapping[str, Mapping[str, Any]]) -> FilterCounts:
    """The first stage: of each source the `traces` it gave, and what it `lost` by reason."""
    counts = FilterCounts("gathered")
    for source, numbers in sources.items():
        counts.count(source, None, numbers["traces"])
        for reason, lost in numbers["lost"].items():
            counts.count(source, reason, lost)
    return counts


def _filter(name: str, sources: Iterable[tuple[str, Mapping[str, Any]]]) -> FilterCounts:
    return FilterCounts(name, {s: SourceCounts(c["num_in"], Counter(c["dropped"])) for s, c in sources})


def _numbers(counts: FilterCounts | SourceCounts) -> dict[str, Any]:
    return {
        "num_in": counts.num_in,
        "num_kept": counts.num_kept,
        "dropped": dict(sorted(counts.dropped.items(), key=lambda item: (-item[1], item[0]))),
    }
