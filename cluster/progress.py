"""The live line of a fit, drawn from what the Train controller reports."""

import json
import sys
import time
from collections import defaultdict
from pathlib import Path

from cluster.console import say
from cluster.layout import Layout, span
from cluster.stream import Order

PLAIN_EVERY_SECONDS = 15  # between lines where the output is no terminal, as in a job's log

SHOWN = 8  # mean FVUs on the line; if there were more, one a kind


class LiveLine:
    """One line that is rewritten on a terminal, and repeated now and then elsewhere."""

    def __init__(self, path: Path, layout: Layout, order: Order):
        self.path, self.order = path, order
        self.keys = {spec.id: span(spec) for spec in layout.specs}
        if len(set(self.keys.values())) > SHOWN:
            self.keys = {spec.id: spec.kind for spec in layout.specs}
        self.terminal = sys.__stdout__ is not None and sys.__stdout__.isatty()
        self.shown_at, self.text = 0.0, ""

    def show(self) -> None:
        """Draws the line if there is something new."""
        try:
            text = self._line(json.loads(self.path.read_text()))
        except (OSError, ValueError):
            text = "fit: starting workers and the first harvest"
        now = time.monotonic()
        if text == self.text or (not self.terminal and now - self.shown_at < PLAIN_EVERY_SECONDS):
            return
        self.shown_at, self.text = now, text
        say(f"\r\x1b[K{text}" if self.terminal else text, end="" if self.terminal else "\n")

    def end(self) -> None:
        if self.terminal:
            say()

    def _line(self, told: dict) -> str:
        position, rate = told["position"], told["rows_per_second"]
        total = self.order.epochs * self.order.sequences * self.order.context
        left = max(0, total - position["rows"]) / rate
        fvus = defaultdict(list)
        for id, figures in told["dictionaries"].items():
            fvus[self.keys[id]].append(figures["fvu"])
        shown = "  ".join(
            f"{key} {sum(v) / len(v):.3f}" for key, v in sorted(fvus.items(), key=lambda item: (len(item[0]), item[0]))
        )
        return (
            f"fit: step {position['step']}/{self.order.steps}  {position['rows']:,}/{total:,} rows  "
            f"{rate:,.0f} rows/s  ETA {int(left) // 60}:{int(left) % 60:02d}  FVU {shown}"
        )
