"""The printed table, and its JSON."""

import os
from typing import Any

from study import Result, Study, figure, mean
from trainers import BATCH_TOPK

SAME_L0 = 0.02  # ours may be this share above the peer's measured L0 and still count as equal
Comparison = tuple[Study, Study]
HEADER = ("trainer", "activation", "target L0", "learning rate", "FVU", "FVU shipped", "L0 shipped", "dead", "CPU s")


def line(study: Study, results: dict[str, Result]) -> tuple[str, ...]:
    """One row of the printed table: both seeds of a study at its best learning rate."""
    final, best = study.final(results), study.best(results)
    if not final or best is None:
        return (study.trainer.name, study.activation, str(study.l0), "not run", *[""] * 5)
    rates = study.trainer.learning_rates[study.activation]
    edge = " (edge)" if best.learning_rate in (rates[0], rates[-1]) else ""
    return (
        study.trainer.name,
        study.activation,
        str(study.l0),
        f"{best.learning_rate:g}{edge}",
        " ".join(f"{figure(result, 'fvu'):.4f}" for result in final),
        " ".join(f"{result['fvu']:.4f}" for result in final),
        " ".join(f"{result['l0']:.1f}" for result in final),
        " ".join(f"{figure(result, 'dead'):.3f}" for result in final),
        " ".join(f"{result['cpu_seconds']:.0f}" for result in final),
    )


def rows(comparison: Comparison, results: dict[str, Result]) -> list[dict[str, Any]]:
    """Ours against one peer, means of both seeds; empty while one of the two is missing."""
    peer, ours = comparison
    theirs, found = peer.final(results), ours.final(results)
    if not theirs or not found:
        return []
    what = f"{peer.activation}, L0 {peer.l0}, against {peer.trainer.name}"
    checks = [(f"held-out FVU, {what}", mean(found, "fvu"), mean(theirs, "fvu"), "fraction")]
    checks.append((f"dead latents, {what}", mean(found, "dead"), mean(theirs, "dead"), "fraction"))
    if peer.activation != BATCH_TOPK:
        checks.append((f"measured L0, {what}", mean(found, "l0"), mean(theirs, "l0") * (1 + SAME_L0), "latents"))
    return [
        {"name": name, "value": value, "unit": unit, "target": f"<= {target:.4g}", "ok": value <= target}
        for name, value, target, unit in checks
    ]


def report(peers: list[Study], comparisons: list[Comparison], results: dict[str, Result]) -> dict[str, Any]:
    """Prints all studies and all comparisons; returns them with their cells."""
    studies = [*peers, *{(ours.activation, ours.l0): ours for _, ours in comparisons}.values()]
    lines = [HEADER, *(line(study, results) for study in studies)]
    widths = [max(len(cells[column]) for cells in lines) for column in range(len(HEADER))]
    for cells in lines:
        print("  ".join(text.ljust(width) for text, width in zip(cells, widths, strict=True)).rstrip())
    found = [row for comparison in comparisons for row in rows(comparison, results)]
    for row in found:
        print(f"{'ok' if row['ok'] else 'MISSED':<7} {row['name']:<65} {row['value']:>8.4f} {row['target']}")
    cells = dict.fromkeys(cell.key for study in studies for cell in [*study.candidates(), *study.second(results)])
    return {
        "machine": f"{os.cpu_count()} cores",
        "rows": found,
        "cells": [results[key] for key in cells if key in results],
    }
