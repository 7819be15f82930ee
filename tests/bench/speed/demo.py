"""The demo's fit beside twelve SAELens runs, and beside SAELens' runner of several dictionaries, on two threads.

Theirs are put together from parts that are measured here, on the same model, text, rows and sizes: a bare pass of the
layers up to the site, which is less than their own harvest takes, and their step. Ours is the whole stage, from its
first token to its last step.
"""

import statistics
from collections.abc import Callable
from typing import Any

from tests.report import Row, row

LAYERS = (5, 9, 12)
ACTIVATIONS, L0S = ("batch_topk", "jumprelu"), (32, 64)
TOKENS, BATCH_ROWS, WIDTH = 150_000, 2048, 4096
BLOCK_TOKENS = 8 * 256  # of harvest.py


def beside_demo(
    run: Callable[[str, str, dict[str, Any]], Any], job: dict[str, Any], ours: str, theirs: str
) -> list[Row]:
    """`ours` and `theirs` are the Pythons of the two environments."""
    job = job | {"width": WIDTH, "rows": BATCH_ROWS, "best": False}
    one_pass = {layer: _pass_seconds(run(ours, "harvest.py", job | {"layer": layer})) for layer in LAYERS}
    step = {
        (activation, k): _seconds(run(theirs, "peers.py", job | {"peer": "saelens", "activation": activation, "k": k}))
        for activation in ACTIVATIONS
        for k in L0S
    }
    together = _seconds(run(theirs, "peers.py", job | {"peer": "saelens_multi", "many": list(step)}))
    steps = TOKENS // BATCH_ROWS
    twelve = sum(len(step) * one_pass[layer] + steps * sum(step.values()) for layer in LAYERS)
    three = sum(one_pass[layer] + steps * together for layer in LAYERS)
    fit = run(ours, "../stream/demo.py", job)
    return [
        row("demo: start of its processes", fit["start"], "s", ">=", 0),
        row("demo: from first token to last step", fit["wall"], "s", ">=", 0),
        row("demo: the same, CPU of all processes", fit["cpu"], "s", ">=", 0),
        row("demo: of these harvest", fit["harvest"], "s", ">=", 0),
        row("demo: of these steps", fit["fit"], "s", ">=", 0),
        row("demo: one bare pass, layers up to the last", one_pass[LAYERS[-1]], "s", ">=", 0),
        row("demo: twelve SAELens runs / wall", twelve / fit["wall"], "times", ">=", 15),
        row("demo: SAELens, four dictionaries a pass / wall", three / fit["wall"], "times", ">=", 7),
    ]


def _pass_seconds(taken: dict[str, list[float]]) -> float:
    """Of the demo's text, from blocks of it."""
    return statistics.median(taken["bare"]) * TOKENS / BLOCK_TOKENS


def _seconds(milliseconds: list[float]) -> float:
    return statistics.median(milliseconds) / 1e3
