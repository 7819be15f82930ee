"""One dictionary in training: parameters, optimiser and the step that fits them to a batch of rows."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sae import schedule
from sae.activations import ACTIVATIONS
from sae.dead import Idle, badly_rebuilt_rows, resampling_due
from sae.dictionary import Dictionary
from sae.fold import Scales, Trained, fold
from sae.fused import FusedStep, covers, fused_step
from sae.kernels import TooDense, for_device
from sae.metrics import FitSums
from sae.objective import Objective
from sae.shape import Group, Shape, size
from sae.shards import has_latents
from sae.spec import DictionarySpec
from sae.team import ALONE, Team

DRAWN_ROWS = 4096  # of a random matrix at once
RESAMPLED_NORM = 0.2  # of the living encoder rows' mean norm; published: Bricken et al. 2023


class TrainingDictionary:
    """Fits ŷ = f·W_dec + b_dec (+ (x − c)·W_skip), f = activation((x − c)·W_encᵀ + b_enc), to rows y.

    `x` and `y` are rows of the sites read and written, each of unit mean square norm, concatenated by layer. c is b_dec
    where a dictionary writes what it reads, else the mean of the first batch's x, or 0. Matrices are stored a latent
    a row, so that every sparse product reads whole rows; those of W_dec have unit norm over all that they write
    (*published* for one site; *assumed* for several).
    """

    def __init__(
        self,
        spec: DictionarySpec,
        site_widths: dict[str, int],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        team: Team = ALONE,
        products: torch.dtype | None = None,
    ):
        """With a team, this rank's shard of the dictionary, which steps in time with the others.

        `products` is what a fused step's are of: by default bfloat16 on a GPU, else `dtype`.
        """
        self.spec, self.team, self.device = spec, team, device
        self.products = products or (torch.bfloat16 if device.type == "cuda" else dtype)
        self.shape = Shape.of(spec, site_widths).shard(team.latents.count)
        self.parameters = {name: value.to(device, dtype) for name, value in self._fresh().items()}
        self.centre_D = torch.zeros(self.shape.d_in, device=device, dtype=dtype)
        self.activation = ACTIVATIONS[spec.activation](spec, device, dtype, team)
        self.idle = Idle(spec, device, team)
        self.learned = self.parameters | self.activation.learned
        self.optimiser = torch.optim.Adam(self.learned.values(), betas=spec.training.adam_betas, fused=True)
        self.l0_start = torch.tensor(spec.l0 * spec.training.l0_start, dtype=torch.float64)
        self.taken_over = torch.zeros((), dtype=torch.bool)  # started from published weights, not from the first batch
        self.steps_done = torch.zeros((), dtype=torch.int64)
        self.progress_done = torch.zeros((), dtype=torch.float64)
        self.sums = FitSums(device, team)
        self.pre_buffer = torch.empty(0, device=device)  # reused: a fresh one a step costs page faults
        self.fused = self._fused()

    @torch.no_grad()
    def step(self, x_BD: Tensor, y_BD: Tensor, progress: float) -> None:
        """One Adam step; `progress` in (0, 1] drives the schedules.

        The loss is the squared error summed over D and averaged over B, plus what activation and options add.
        """
        try:
            error_BD = (self._step_fused if self.fused else self._step_plain)(x_BD, y_BD, progress)
        except TooDense:
            error_BD = self._step_plain(x_BD, y_BD, progress)
        if self.spec.options.auxk is not None:
            self.activation.relax(self.idle.dead)
        if resampling_due(self.spec, self.progress_done.item(), progress):
            self._resample(x_BD, y_BD, error_BD)
        self.steps_done += 1
        self.progress_done.fill_(progress)

    def _step_plain(self, x_BD: Tensor, y_BD: Tensor, progress: float) -> Tensor:
        error_BD = self.set_gradients(x_BD, y_BD, progress)
        for group in self.optimiser.param_groups:
            group["lr"] = self._now(progress).learning_rate
        self.optimiser.step()
        for parameter in self.learned.values():
            parameter.grad = None  # as large as all the rest of a step
        self._normalise()
        return error_BD

    def _step_fused(self, x_BD: Tensor, y_BD: Tensor, progress: float) -> Tensor:
        fused = self.fused
        assert fused is not None
        if self.steps_done == 0:
            self._start(x_BD, y_BD, len(x_BD), self._now(progress))
        fused.step(x_BD, y_BD, self._now(progress))
        self.sums.add(fused.squared_error, fused.variance, fused.values_P, len(y_BD))
        return fused.error_BD

    def _fused(self) -> FusedStep | None:
        """For what it can step; `sae.objective` does all."""
        if not covers(self.spec, self.team, self.device):
            return None
        return fused_step(self, for_device(self.device), self.products)

    @torch.no_grad()
    def set_gradients(self, x_BD: Tensor, y_BD: Tensor, progress: float) -> Tensor:
        """Sets every learned tensor's `.grad`, as a step does that is not fused; the error ŷ − y. [B, d_out]"""
        n_rows = self.team.rows.total(len(x_BD), self.device)
        if self.steps_done == 0:
            self._start(x_BD, y_BD, n_rows, self._now(progress))
        now = self._now(progress)
        centred_BD = x_BD - self.centre()
        pre_BF = self._pre_activations(centred_BD)
        objective = Objective(self, centred_BD, y_BD, pre_BF, n_rows, now)
        for name, parameter in self.learned.items():
            parameter.grad = objective.gradients[name]
        self.idle.update(objective.pairs, n_rows)
        squared_error = torch.linalg.vector_norm(objective.error_BD).square()
        variance = y_BD.var(0, correction=0).sum() * len(y_BD)
        self.sums.add(squared_error, variance, objective.pairs.values_P, len(y_BD))
        return objective.error_BD

    @torch.no_grad()
    def take_over(self, start: Trained) -> None:
        """Starts from given weights in place of random ones (`sae.start`): the same function, with unit decoder rows.
        A shard takes its part of the whole dictionary's.

        If the L0 target decays, it does so from the L0 that these weights have on the first batch.
        """
        mine = self.team.mine
        encoders, decoders = (list(map(mine, matrices)) for matrices in (start.w_enc, start.w_dec))
        norms = [w_FD.norm(dim=1).clamp_min(torch.finfo(w_FD.dtype).tiny) for w_FD in decoders]
        for n, norm_F in enumerate(norms):
            self.parameters[f"w_dec.{n}"].copy_(decoders[n] / norm_F[:, None])
            self.parameters[f"w_enc.{n}"].copy_(encoders[n] * norm_F[:, None])
        for n, skip in enumerate(start.w_skip):
            self.parameters[f"w_skip.{n}"].copy_(skip)
        self.parameters["b_dec"].copy_(start.b_dec_D)
        self.centre_D.copy_(start.centre_D)
        norm_F = torch.cat(norms)
        self.parameters["b_enc"].copy_(mine(start.b_enc_F) * norm_F)
        threshold_F = (mine(start.threshold_F) * norm_F).to(self.parameters["b_enc"])
        self.parameters["b_enc"] += self.activation.take_over(threshold_F)
        self.taken_over.fill_(True)

    def weights(self, name: str) -> list[Tensor]:
        """The parameters `name`.0, `name`.1, …: w_enc and w_dec by group, w_skip by layer."""
        return [value for key, value in self.parameters.items() if key.startswith(f"{name}.")]

    def folded(self, scales: dict[str, float]) -> Dictionary:
        """The dictionary as it ships, on raw rows; `scales` are what each site key's rows were divided by."""
        return fold(self.shape, self.trained(), self._scales(scales))

    def trained(self) -> Trained:
        """The weights, and the activation in its shipping form."""
        b_enc_F, b_dec_D = self.parameters["b_enc"], self.parameters["b_dec"]
        w_enc, w_dec, w_skip = (self.weights(name) for name in ("w_enc", "w_dec", "w_skip"))
        gain_F, shift_F, threshold_F, k = self.activation.ships()
        return Trained(w_enc, b_enc_F, gain_F, shift_F, threshold_F, w_dec, b_dec_D, self.centre(), w_skip, k)

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, by name, of this shard; `sae.shards` puts shards together."""
        state = dict(self._stateful())
        for name, parameter in self.learned.items():
            for moment, value in self.optimiser.state[parameter].items():
                state[f"adam.{name}.{moment}"] = value
        return state

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes over its part of a whole dictionary's state, on this dictionary's device."""
        for name, target in self._stateful().items():
            target.copy_(self._part(state, name))
        for name, parameter in self.learned.items():
            keys = [key for key in state if key.startswith(f"adam.{name}.")]
            self.optimiser.state[parameter] = {
                key.removeprefix(f"adam.{name}."): self._part(state, key).to(self.device, copy=True) for key in keys
            }
        self.fused = self._fused()

    def _part(self, state: Mapping[str, Tensor], name: str) -> Tensor:
        tensor = state[name]
        return self.team.mine(tensor).contiguous() if has_latents(name, tensor) else tensor

    def _stateful(self) -> dict[str, Tensor]:
        activation = {f"activation.{name}": value for name, value in self.activation.state.items()}
        counters = {"steps_done": self.steps_done, "progress_done": self.progress_done, "idle_rows": self.idle.rows_F}
        counters |= {"l0_start": self.l0_start, "taken_over": self.taken_over}
        return self.parameters | {"centre": self.centre_D} | activation | counters

    def _fresh(self) -> dict[str, Tensor]:
        """Random unit decoder rows; encoder rows along them or along directions of their own."""
        generator, training = torch.Generator().manual_seed(self.spec.seed), self.spec.training
        tied = training.encoder_start == "tied" or (training.encoder_start is None and self.spec.autoencodes)
        encoders, decoders = {}, {}
        for n, group in enumerate(self.shape.groups):
            decoder = _unit_rows(self._random(group, size(group.writes), generator))
            own = decoder[:, : size(group.reads)]
            free = own if tied else self._random(group, size(group.reads), generator)
            encoders[f"w_enc.{n}"], decoders[f"w_dec.{n}"] = training.encoder_init_scale * _unit_rows(free), decoder
        biases = {"b_enc": torch.zeros(self.shape.width), "b_dec": torch.zeros(self.shape.d_out)}
        widths = zip(self.shape.read_widths, self.shape.write_widths, strict=True)
        skips = {f"w_skip.{n}": torch.zeros(*pair) for n, pair in enumerate(widths)}
        return encoders | decoders | biases | (skips if self.spec.options.affine else {})

    def _random(self, group: Group, n_columns: int, generator: torch.Generator) -> Tensor:
        """This shard's rows of a group's random matrix, which is drawn in parts: the whole may be too large for one
        process. [F of the shard's group, columns]"""
        width, parts = group.width * self.team.latents.count, []
        for first in range(0, width, DRAWN_ROWS):
            drawn = torch.randn(min(DRAWN_ROWS, width - first), n_columns, generator=generator)
            parts.append(drawn[(self.team.latents.index - first) % self.team.latents.count :: self.team.latents.count])
        return torch.cat(parts)

    def _start(self, x_BD: Tensor, y_BD: Tensor, n_rows: int, now: schedule.Now) -> None:
        if self.taken_over:
            pre_BF = self._pre_activations(x_BD - self.centre())
            active = self.team.sum((pre_BF > self.activation.threshold()).sum())
            self.l0_start.fill_(active.item() / n_rows)
            return
        if self.spec.training.centre == "data":
            self.parameters["b_dec"].copy_(self.team.rows.sum(y_BD.sum(0)) / n_rows)
            self.centre_D.copy_(self.team.rows.sum(x_BD.sum(0)) / n_rows)
        if self.fused:  # its own first selection is where these activations start
            return
        self.parameters["b_enc"] += self.activation.start(self._pre_activations(x_BD - self.centre()), n_rows, now)

    def _now(self, progress: float) -> schedule.Now:
        return schedule.now(self.spec, progress, int(self.steps_done) + 1, self.l0_start.item())

    def centre(self) -> Tensor:
        return self.parameters["b_dec"] if self.spec.autoencodes else self.centre_D

    def _pre_activations(self, centred_BD: Tensor) -> Tensor:
        if len(self.pre_buffer) != len(centred_BD):
            self.pre_buffer = centred_BD.new_empty(len(centred_BD), self.shape.width)
        for group, w_FD in zip(self.shape.groups, self.weights("w_enc"), strict=True):
            bias_F, part = self.parameters["b_enc"][group.latents], self.pre_buffer[:, group.latents]
            torch.addmm(bias_F, centred_BD[:, group.reads], w_FD.T, out=part)
        return self.pre_buffer

    def _normalise(self) -> None:
        for w_FD in self.weights("w_dec"):
            w_FD /= w_FD.norm(dim=1, keepdim=True)

    def _resample(self, x_BD: Tensor, y_BD: Tensor, error_BD: Tensor) -> None:
        """Dead latents of all shards restart along badly rebuilt rows of all replicas, with a small encoder, and with
        their moments forgotten."""
        n_rows = self.team.rows.total(len(x_BD), self.device)
        is_dead_F = self.idle.is_dead_F
        everyones_F = self.team.latents.gather(is_dead_F.long()).T.flatten()
        count = min(int(everyones_F.sum()), n_rows)
        if count == 0:
            return
        weights_B = self._of_all_replicas(error_BD.square().sum(1), n_rows)
        rows = badly_rebuilt_rows(weights_B, count, self.spec.seed, step=int(self.steps_done))
        number_F = self.team.mine(everyones_F.cumsum(0) - 1)  # of a dead latent among those of all shards
        dead = (is_dead_F & (number_F < count)).nonzero()[:, 0]
        inputs_XD, targets_XD = (
            self._of_all_replicas(part_BD, n_rows)[rows[number_F[dead]]]
            for part_BD in (x_BD - self.centre(), y_BD - self.parameters["b_dec"])
        )
        for n, group in enumerate(self.shape.groups):
            here = (dead >= group.latents.start) & (dead < group.latents.stop)
            mine, living_F = dead[here] - group.latents.start, ~is_dead_F[group.latents]
            w_enc_FD, w_dec_FD = self.parameters[f"w_enc.{n}"], self.parameters[f"w_dec.{n}"]
            living = torch.stack([w_enc_FD[living_F].norm(dim=1).sum(), living_F.sum()])
            total, n_living = self.team.latents.sum(living)
            norm = RESAMPLED_NORM * (total / n_living if n_living else 1)
            w_enc_FD[mine] = norm * _unit_rows(inputs_XD[here][:, group.reads])
            w_dec_FD[mine] = _unit_rows(targets_XD[here][:, group.writes])
            self._forget_moments({f"w_enc.{n}": mine, f"w_dec.{n}": mine})
        self.parameters["b_enc"][dead] = 0
        self.activation.restart(dead)
        self._forget_moments(dict.fromkeys(("b_enc", *self.activation.learned), dead))
        self.idle.rows_F[dead] = 0

    def _of_all_replicas(self, mine: Tensor, n_rows: int) -> Tensor:
        """What each replica has a row of the batch of, in the batch's order. [B of this replica, …] to [B, …]"""
        whole = mine.new_zeros(n_rows, *mine.shape[1:])
        whole.tensor_split(self.team.rows.count)[self.team.rows.index].copy_(mine)
        return self.team.rows.sum(whole)

    def _forget_moments(self, rows: dict[str, Tensor]) -> None:
        for name, latents in rows.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                self.optimiser.state[self.learned[name]][moment][latents] = 0

    def _scales(self, scales: dict[str, float]) -> Scales:
        reads, writes = ([scales[site.key] for site in sites] for sites in (self.spec.reads, self.spec.writes))
        return Scales(reads, writes)


def _unit_rows(w_FD: Tensor) -> Tensor:
    return w_FD / w_FD.norm(dim=1, keepdim=True)
