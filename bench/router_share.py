"""What of a first token's time was the router's own, from its ``/metrics``: two scrapes, and what
came between them."""

from __future__ import annotations

import urllib.request
from collections import defaultdict
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

_OWN = {
    "in": 'pdserve_router_seconds{part="in"}',
    "out": 'pdserve_router_seconds{part="out"}',
    "loop_lag": "pdserve_event_loop_lag_seconds",
    "worker_queue": 'pdserve_stage_seconds{stage="prefill_queue"}',
    "worker": 'pdserve_stage_seconds{stage="prefill"}',
}


@dataclass(frozen=True, slots=True)
class Histograms:
    """Counts up to each bound, in seconds, by the name of the histogram and its labels."""

    counts: dict[str, dict[float, float]]

    @staticmethod
    def of(text: str) -> Histograms:
        counts: dict[str, dict[float, float]] = defaultdict(dict)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if family.type == "histogram" and sample.name.endswith("_bucket"):
                    labels = dict(sample.labels)
                    bound = float(labels.pop("le"))
                    shown = ",".join(f'{name}="{value}"' for name, value in labels.items())
                    name = family.name + (f"{{{shown}}}" if shown else "")
                    counts[name][bound] = sample.value
        return Histograms(dict(counts))

    @staticmethod
    def scrape(port: int) -> Histograms:
        url = f"http://127.0.0.1:{port}/metrics"
        with urllib.request.urlopen(url, timeout=30) as response:
            return Histograms.of(response.read().decode())

    def since(self, before: Histograms) -> Histograms:
        return Histograms(
            {
                name: {
                    bound: count - before.counts.get(name, {}).get(bound, 0.0)
                    for bound, count in counts.items()
                }
                for name, counts in self.counts.items()
            }
        )

    def quantile_ms(self, name: str, share: float) -> float | None:
        """Where it lies between two bounds, as if those between them lay evenly; None of none,
        and infinite past the last bound."""
        below, before = 0.0, 0.0
        counts = sorted(self.counts.get(name, {}).items())
        wanted = share * counts[-1][1] if counts else 0.0
        for bound, count in counts:
            if count >= wanted > 0.0:
                return 1e3 * (below + (bound - below) * (wanted - before) / (count - before))
            below, before = bound, count
        return None


def own_share(port: int, before: Histograms) -> dict[str, dict[str, float | None]]:
    """Percentiles in ms of each part of a first token's time, since ``before``."""
    found = Histograms.scrape(port).since(before)
    return {
        part: {f"p{at}": found.quantile_ms(name, at / 100) for at in (50, 90, 99)}
        for part, name in _OWN.items()
    }
