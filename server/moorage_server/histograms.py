"""What is measured each time that it happens: how long things take, and how much loads bring."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import Histogram
from prometheus_client.core import Metric

_PASSES = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_CALLS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 1800, 7200)
_LOADS = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
_SIZES = tuple(float(1 << bits) for bits in range(20, 40, 2))


@dataclass(frozen=True)
class Measure:
    """One histogram.

    Attributes:
        text: What it says.
        labels: What it is told apart by.
        buckets: Upper bounds.
    """

    text: str
    labels: tuple[str, ...]
    buckets: tuple[int | float, ...]


#: Every histogram by its name.
MEASURES: Mapping[str, Measure] = {
    "moorage_call_seconds": Measure(
        "Calls, to the end of their answer, by the gRPC code that the caller got",
        ("method", "code"),
        _CALLS,
    ),
    "moorage_forward_seconds": Measure(
        "Answered forward passes by stage: queue until the first row ran, and of the batches that "
        "held their rows pad, execute and transfer",
        ("stage",),
        _PASSES,
    ),
    "moorage_load_seconds": Measure(
        "Loads that became READY by stage: fetch, place and compile, which run side by side, "
        "prove, and whole from the request on",
        ("stage",),
        _LOADS,
    ),
    "moorage_load_bytes": Measure(
        "Bytes of the same loads by stage: fetch, where files that were there already count at "
        "once, and place",
        ("stage",),
        _SIZES,
    ),
}


class Histograms:
    """All histograms of one server, as a collector for a registry."""

    def __init__(self) -> None:
        self._histograms = {
            name: Histogram(name, m.text, m.labels, registry=None, buckets=m.buckets)
            for name, m in MEASURES.items()
        }

    def observe(self, name: str, value: int | float, *labels: str) -> None:
        """Takes note of one event.

        Args:
            name: The histogram.
            value: How long, in seconds, or how many bytes.
            *labels: What kind of event, in the order of the histogram's labels.
        """
        self._histograms[name].labels(*labels).observe(value)

    def collect(self) -> Iterator[Metric]:
        """The histograms as they are now, without the times at which each began."""
        for histogram in self._histograms.values():
            for family in histogram.collect():
                family.samples = [s for s in family.samples if not s.name.endswith("_created")]
                yield family
