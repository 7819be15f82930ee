"""What a sweep shows at its end: the table, summary.json and the pictures."""

import itertools
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from cluster.evaluate import LARGE_NORM, Evaluated
from cluster.layout import span
from cluster.recipe import Recipe
from cluster.run_folder import replace_text

LEGEND_CURVES = 24  # a longer legend would cover the picture


def rows(
    recipe: Recipe, results: dict[str, Evaluated], places: dict[str, str], rows_per_second: float
) -> list[dict[str, Any]]:
    """One row a dictionary, with every figure of the table."""
    return [
        {
            "id": spec.id, "kind": spec.kind, "site": spec.site, "layers": list(spec.layers), "of": span(spec),
            "activation": spec.activation, "width": spec.width, "l0_target": spec.l0,
        }
        | results[spec.id].scores._asdict()
        | {"rows_per_second": rows_per_second, "path": places[spec.id]}
        for spec in recipe.specs()
    ]  # fmt: skip


def table(summary: list[dict[str, Any]]) -> str:
    wide = max(len(row["id"]) for row in summary) + 1
    lines = [f"{'dictionary':<{wide}} {'FVU':>7} {'L0':>7} {'dead':>7} {'loss recovered':>15} {'rows/s':>8}"]
    lines += [
        f"{row['id']:<{wide}} {row['fvu']:>7.4f} {row['l0']:>7.1f} {row['dead_fraction']:>7.1%} "
        f"{row['loss_recovered']:>15.4f} {row['rows_per_second']:>8,.0f}"
        for row in summary
    ]
    large = {row["of"]: row["rows_large"] for row in summary}
    counts = ", ".join(f"{count} at {what}" for what, count in large.items())
    rows, dropped = summary[0]["rows"], summary[0]["rows_dropped"]
    lines += [
        f"on {rows:,} held-out rows, {dropped} dropped for their norm; kept above {LARGE_NORM}x the median: {counts}"
    ]
    return "\n".join(lines)


def write_summary(path: Path, recipe: Recipe, summary: list[dict[str, Any]], seconds: dict[str, float]) -> None:
    content = {"name": recipe.name, "model": recipe.model.name, "seconds": seconds, "dictionaries": summary}
    replace_text(path, json.dumps(content, indent=2) + "\n")


def draw_frontier(path: Path, recipe: Recipe, summary: list[dict[str, Any]]) -> None:
    """FVU against L0 on held-out text: one curve for each suite and what differs in it but L0."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    curves: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in summary:
        suite, directory, name = Path(row["path"]).parts[-3:]
        suite = suite.removeprefix(f"{Path(recipe.model.public_name).name}-")
        curves[suite, f"{directory}/{re.sub('_l0_[a-z0-9]+', '', name)}"].append(row)
    suites, places = (list(dict.fromkeys(part)) for part in zip(*curves, strict=True))
    colours = dict(zip(places, pyplot.get_cmap("viridis")(np.linspace(0, 0.85, len(places))), strict=True))
    styles = dict(zip(suites, itertools.cycle(("o-", "s--", "^:", "D-.")), strict=False))
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for (suite, place), curve in curves.items():
        curve.sort(key=lambda row: row["l0"])
        points = [row["l0"] for row in curve], [row["fvu"] for row in curve]
        axes.plot(*points, styles[suite], color=colours[place], label=f"{suite}/{place}")
    axes.set_xlabel("L0: mean active latents a row")
    axes.set_ylabel("FVU: fraction of variance unexplained")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(f"{recipe.name}: {recipe.model.name}, {recipe.corpus.train_tokens:,} tokens, lower left is better")
    axes.grid(alpha=0.3)
    if len(curves) <= LEGEND_CURVES:
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def draw_frequencies(path: Path, title: str, evaluated: Evaluated) -> None:
    """How often each latent fires on held-out rows, as a histogram of log frequencies."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    frequencies = evaluated.fired_F / evaluated.scores.rows
    alive = frequencies[frequencies > 0]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.hist(np.log10(alive), bins=50)
    axes.set_xlabel("log10 of the share of rows on which a latent is active")
    axes.set_ylabel("latents")
    axes.set_title(
        f"{title}\n{len(alive):,} of {len(frequencies):,} latents fired on {evaluated.scores.rows:,} held-out rows",
        fontsize="medium",
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
