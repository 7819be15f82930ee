"""The training loss of every kind, activation and option by dense formulas, differentiable in every parameter.

It shares no code with sae/objective.py, sae/pairs.py or an activation's backward:
 matrices are whole [F, D], latents dense, each prefix decoded by itself.
"""

import torch
from torch import Tensor

from sae.activations import LP_FLOOR
from sae.estimators import Gate, Jump
from sae.matryoshka import prefix_ends
from sae.schedule import Now
from sae.spec import DictionarySpec
from sae.step import TrainingDictionary


def whole(blocks: dict[str, Tensor], name: str, spec: DictionarySpec, widths: list[int]) -> Tensor:
    """A [F, ΣD] matrix from the blocks of a layered dictionary, zeros elsewhere; the one block of any other."""
    parts = [value for key, value in blocks.items() if key.startswith(f"{name}.")]
    if len(parts) == 1:
        return parts[0]
    rows = []
    for n, block in enumerate(parts):
        before = block.new_zeros(len(block), sum(widths[:n]))
        after = block.new_zeros(len(block), sum(widths) - before.shape[1] - block.shape[1])
        rows.append(torch.cat([before, block, after], dim=1))
    return torch.cat(rows)


def dense_loss(dictionary: TrainingDictionary, p: dict[str, Tensor], x: Tensor, y: Tensor, dead: Tensor, now: Now):
    """`p` are clones of `dictionary.learned`; what is held constant is read from the dictionary after its own step."""
    spec, options = dictionary.spec, dictionary.spec.options
    shape = dictionary.shape
    w_enc, w_dec = whole(p, "w_enc", spec, shape.read_widths), whole(p, "w_dec", spec, shape.write_widths)
    x = x - (p["b_dec"] if spec.autoencodes else dictionary.centre_D)
    z = x @ w_enc.T + p["b_enc"]
    latents, penalty = ACTIVATIONS[spec.activation](dictionary, p, z, now)

    fixed = p["b_dec"].expand(len(x), -1)
    if options.affine:
        parts = zip(x.split(shape.read_widths, dim=1), range(len(shape.read_widths)), strict=True)
        fixed = fixed + torch.cat([part @ p[f"w_skip.{n}"] for part, n in parts], dim=1)
    losses, frozen = [], []
    ends = [prefix_ends(spec, group, int(dictionary.steps_done) + 1) for group in shape.groups]
    for prefix in range(len(ends[0])):
        mask = torch.zeros(spec.width, dtype=z.dtype)
        for group, group_ends in zip(shape.groups, ends, strict=True):
            mask[group.latents.start : group.latents.start + group_ends[prefix]] = 1
        losses.append((latents * mask @ w_dec + fixed - y).square().sum(1).mean())
        frozen.append((torch.relu(z) * mask @ w_dec.detach() + fixed.detach() - y).square().sum(1).mean())
    loss = torch.stack(losses).mean() + penalty
    if spec.activation == "gated":
        loss = loss + torch.stack(frozen).mean()

    if options.auxk is not None:
        left_over = (y - latents @ w_dec - fixed).detach()
        allowed = torch.full_like(z, -torch.inf)
        allowed[:, dead] = z[:, dead]
        count = min(options.auxk.latents or shape.d_out // 2, len(dead))
        largest = allowed.topk(count, dim=1)
        values = torch.zeros_like(z).scatter(1, largest.indices, torch.relu(largest.values))
        rebuilt = values @ w_dec
        loss = loss + options.auxk.coefficient * (left_over - rebuilt).square().sum() / left_over.square().sum()
    if options.preactivation is not None:
        threshold = p["threshold"] if spec.activation == "jumprelu" else dictionary.activation.threshold()
        below = torch.relu(threshold - z)[:, dead]
        loss = loss + options.preactivation.coefficient * below.sum(1).mean()
    return loss


def _topk(dictionary, p, z, now):
    kept = z.topk(round(now.l0), dim=1).values[:, -1:].detach()
    return torch.relu(z) * (z >= kept), 0.0


def _batch_topk(dictionary, p, z, now):
    cut = z.flatten().topk(round(now.l0 * len(z))).values[-1].detach()
    return torch.relu(z) * (z >= cut), 0.0


def _l1(dictionary, values, now):
    """λ·Σ f^p a row, λ rescaled so that the penalty equals that of p = 1."""
    strength, raised = dictionary.activation.state["coefficient"] * now.sparsity, values[values > 0] + LP_FLOOR
    if now.exponent == 1:
        return strength * values.sum() / len(values)
    powers = raised.pow(now.exponent).sum()
    return strength * (raised.sum() / powers).detach() * powers / len(values)


def _relu(dictionary, p, z, now):
    return torch.relu(z), _l1(dictionary, torch.relu(z), now)


def _gated(dictionary, p, z, now):
    magnitude = torch.relu(p["log_gain"].exp() * z + p["shift"])
    return magnitude * (z > 0), _l1(dictionary, torch.relu(z), now)


def _jumprelu(dictionary, p, z, now):
    settings = dictionary.spec.training.jumprelu
    strength = dictionary.activation.state["coefficient"] * now.sparsity
    latents, frequencies = (f.apply(z, p["threshold"], settings.bandwidth) for f in (Jump, Gate))
    frequencies = frequencies.mean(0)
    l0 = frequencies.sum()
    penalty = {
        "linear": lambda: strength * l0,
        "quadratic": lambda: strength * (2 / now.l0) * (l0 - now.l0) ** 2,
        "tanh": lambda: strength * torch.tanh(settings.tanh_scale * latents).sum() / len(z),
    }[settings.penalty]()
    # The frequency falls as exp(−θ/m), with m the mean of z − θ over a latent's active rows.
    active = (z > p["threshold"]).to(z.dtype)
    margins = (z.detach() - p["threshold"]) * active
    mean = (margins.sum(0) / active.sum(0).clamp_min(1)).detach().clamp_min(1e-30)
    surrogate = (active + (margins - margins.detach()) / mean).mean(0)
    excess = torch.relu(surrogate - settings.frequency_limit)
    frequency = settings.frequency_coefficient * now.sparsity * (excess.square() / settings.frequency_limit).sum()
    return latents, penalty + frequency


ACTIVATIONS = {"relu": _relu, "topk": _topk, "batch_topk": _batch_topk, "jumprelu": _jumprelu, "gated": _gated}
