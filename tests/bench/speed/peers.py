"""One peer's own loop on the rows, in the peers' environment: prints the milliseconds of its last steps as JSON.

python peers.py '{"peer": …, "activation": …, "best": …, "rows": …, "columns": …, "width": …, "k": …, "threads": …, …}'
Best settings are those that reference tables of these packages name: bf16 autocast where there is one.
"""

import json
import os
import sys
import tempfile
import types
from collections.abc import Callable
from typing import Any

os.environ |= {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}

import torch
from rows import CLOCKS, Timed, batches

RATE = 1e-3


def _saelens_of(job: dict[str, Any], activation: str, k: int) -> Any:
    import sae_lens

    name = {"batch_topk": "BatchTopK", "topk": "TopK", "jumprelu": "JumpReLU"}[activation]
    own = {"l0_coefficient": 0.05} if activation == "jumprelu" else {"k": k}
    config = getattr(sae_lens, f"{name}TrainingSAEConfig")(d_in=job["columns"], d_sae=job["width"], **own)
    return getattr(sae_lens, f"{name}TrainingSAE")(config)


def _saelens_training(job: dict[str, Any]) -> Any:
    from sae_lens.config import LoggingConfig, SAETrainerConfig

    return SAETrainerConfig(
        total_training_samples=job["steps"] * job["rows"],
        train_batch_size_samples=job["rows"],
        lr=RATE,
        lr_end=RATE,  # asserted to be there
        feature_sampling_window=10 * job["steps"],  # at each boundary it makes a histogram for wandb
        autocast=job["best"],
        logger=LoggingConfig(log_to_wandb=False),
    )


def saelens(job: dict[str, Any], stream: Timed) -> None:
    import sae_lens

    sae = _saelens_of(job, job["activation"], job["k"])
    sae_lens.SAETrainer(cfg=_saelens_training(job), sae=sae, data_provider=stream).fit()


def saelens_multi(job: dict[str, Any], stream: Timed) -> None:
    """All dictionaries of `job["many"]`, pairs of activation and L0, on one stream."""
    from sae_lens.training.multi_sae_trainer import MultiSAETrainer

    saes = {f"{activation}_{k}": _saelens_of(job, activation, k) for activation, k in job["many"]}
    hooks = dict.fromkeys(saes, "site")
    stream = ({"site": x_BD} for x_BD in stream)  # type: ignore[assignment]
    MultiSAETrainer(cfg=_saelens_training(job), saes=saes, hook_names=hooks, data_provider=stream).fit()


def dictionary_learning(job: dict[str, Any], stream: Timed) -> None:
    sys.modules["nnsight"] = types.ModuleType("nnsight")  # imported, and used by nothing here
    sys.modules["nnsight"].LanguageModel = object
    from dictionary_learning import training
    from dictionary_learning.trainers import batch_top_k, top_k

    trainer, made = {
        "topk": (top_k.TopKTrainer, top_k.AutoEncoderTopK),
        "batch_topk": (batch_top_k.BatchTopKTrainer, batch_top_k.BatchTopKSAE),
    }[job["activation"]]
    config = {
        "trainer": trainer, "dict_class": made, "activation_dim": job["columns"], "dict_size": job["width"],
        "k": job["k"], "steps": job["steps"], "layer": 0, "lm_name": "rows", "lr": RATE, "warmup_steps": 1,
        "device": "cpu",
    }  # fmt: skip
    narrow = {"autocast_dtype": torch.bfloat16} if job["best"] else {}
    training.trainSAE(data=stream, trainer_configs=[config], steps=job["steps"], device="cpu", **narrow)


def sparsify(job: dict[str, Any], stream: Timed) -> None:
    """Its trainer takes no rows: what that does around a step stands here."""
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(job["columns"], SparseCoderConfig(num_latents=job["width"], k=job["k"]), "cpu")
    optimiser = torch.optim.Adam(coder.parameters(), lr=RATE)
    for _ in range(job["steps"]):
        x_BD = next(stream)
        coder.set_decoder_norm_to_unit_norm()
        with torch.autocast("cpu", torch.bfloat16, enabled=job["best"]):
            loss = coder(x_BD).fvu
        loss.item()
        loss.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimiser.step()
        optimiser.zero_grad()


def llamascopium(job: dict[str, Any], stream: Timed) -> None:
    """At its best without its metrics, which need all activations again."""
    from llamascopium import Initializer, InitializerConfig, SAEConfig, Trainer, TrainerConfig

    def batch_of(x_BD: torch.Tensor) -> dict[str, torch.Tensor]:
        tokens_B = torch.ones(len(x_BD), dtype=torch.long)
        return {"site": x_BD, "tokens": tokens_B, "mask": tokens_B.bool()}

    config = SAEConfig(
        hook_point_in="site", hook_point_out="site", d_model=job["columns"], top_k=job["k"], device="cpu",
        expansion_factor=job["width"] / job["columns"], act_fn=job["activation"].replace("_", ""), dtype=torch.float32,
    )  # fmt: skip
    norm = torch.cat(stream.pool).norm(dim=1).mean().item()
    sae = Initializer(InitializerConfig()).initialize_sae_from_config(
        config, activation_stream=[batch_of(x_BD) for x_BD in stream.pool], activation_norm={"site": norm}
    )
    training = TrainerConfig(
        amp_dtype=torch.bfloat16 if job["best"] else torch.float32, lr=RATE, lr_warm_up_steps=1, lr_cool_down_steps=1,
        k_warmup_steps=0, total_training_tokens=job["steps"] * job["rows"], log_frequency=10 * job["steps"],
        n_checkpoints=0, skip_metrics_calculation=job["best"], exp_result_path=tempfile.mkdtemp(),
        l1_coefficient_warmup_steps=1,
    )  # fmt: skip
    Trainer(training).fit(sae=sae, activation_stream=map(batch_of, stream))


PEERS: dict[str, Callable[[dict[str, Any], Timed], None]] = {
    "saelens": saelens,
    "saelens_multi": saelens_multi,
    "dictionary_learning": dictionary_learning,
    "sparsify": sparsify,
    "llamascopium": llamascopium,
}

if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    stream = Timed(batches(job), CLOCKS[job["clock"]])
    PEERS[job["peer"]](job, stream)
    next(stream)  # when the last step ended
    print(json.dumps(stream.milliseconds(job["timed"])))
