"""Python imports this at its start in every process whose PYTHONPATH begins with this folder, Ray's workers included.

It changes modules of ours as they are imported: always so that each rank writes down what it trains on, and, as CHAOS
(a JSON file, read when needed) asks, so that something comes late or is done wrongly. A wrong run must turn a test red.
"""

import hashlib
import json
import math
import os
import random
import sys
import time
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import PathFinder
from pathlib import Path


def asked(name: str):
    """What the test wants now, for this run."""
    return json.loads(Path(os.environ["CHAOS"]).read_text()).get(name)


def witness(fit) -> None:
    """Each batch that a rank trains on: the ids of its rows, and a digest of each site's rows."""
    share = fit.exchange.__globals__["Share"]
    batch = share.batch

    def witnessed(self, chosen):
        rows = batch(self, chosen)
        if folder := asked("witness"):
            digests = {
                key: hashlib.sha256(tensor.view(dtype=fit.torch.int16).cpu().numpy().tobytes()).hexdigest()
                for key, tensor in rows.items()
            }
            line = {"ids": self.ids[chosen].tolist(), "replica": self.replica, "rows": digests}
            with Path(folder, f"{os.getpid()}.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
        return rows

    share.batch = witnessed


def late(harvest) -> None:
    """Blocks come in any order of time."""
    call = harvest.Harvester.__call__

    def delayed(self, batch):
        if longest := asked("longest_delay"):
            time.sleep(random.uniform(0, longest))
        return call(self, batch)

    harvest.Harvester.__call__ = delayed


def held(harvest) -> None:
    """Calls are written down in the folder `calls`, with the node that they are on. From the block `hold_from` on they
    stand still while that is asked. One that is done again can come to other rows."""
    call = harvest.Harvester.__call__

    def holding(self, batch):
        if not (folder := asked("calls")):
            return call(self, batch)
        block, node = int(batch[harvest.BLOCK][0]), harvest.ray.get_runtime_context().get_node_id()
        again = any(Path(folder).glob(f"begun-{block}-*"))
        Path(folder, f"begun-{block}-{node}").touch()
        while block >= (asked("hold_from") or math.inf):
            time.sleep(0.05)
        rows = call(self, batch)
        Path(folder, f"done-{block}-{node}").touch()
        if again and asked("sabotage") == "other rows the second time":
            rows = {key: column[::-1] if "." in key else column for key, column in rows.items()}
        return rows

    harvest.Harvester.__call__ = holding


def resumed_wrongly(fit) -> None:
    """How a run could go on wrongly after a restart, one fault at a time."""
    restore, load, batches = fit.Rank.restore, fit.TrainingDictionary.load, fit.Order.batches

    def restored(self):
        restore(self)
        sabotage, at = asked("sabotage"), self.position
        resumed = at.step > 0
        if resumed and sabotage == "order from the start":
            self.position = at._replace(window=0, batch=0)
        elif resumed and sabotage == "skip a batch":
            self.position = at._replace(batch=at.batch + 1)
        elif resumed and sabotage == "repeat a batch":
            self.position = at._replace(window=at.window - (at.batch == 0), batch=max(0, at.batch - 1))
        elif resumed and sabotage == "another seed":
            fit.Order.batches = lambda self, window, rows: batches(self, window + 1, rows)

    def loaded(self, state):
        forgotten = ".exp_avg" if asked("sabotage") == "forget the momentum" else "nothing"
        load(self, {name: state[name] * (forgotten not in name) for name in state})

    fit.Rank.restore, fit.TrainingDictionary.load = restored, loaded


def stopped_wrongly(fit) -> None:
    """A stop without a checkpoint."""
    checkpoint = fit.Rank.checkpoint

    def skipped(self, position, *, last):
        if not (asked("sabotage") == "no checkpoint at the stop" and last):
            checkpoint(self, position, last=last)

    fit.Rank.checkpoint = skipped


def waits_for_the_tracker(curves) -> None:
    """Curves are logged while the ranks wait, as a simpler system would."""
    add = curves.Curves.add

    def synchronous(self, records):
        add(self, records)
        if asked("sabotage") == "wait for the tracker":
            self._log_waiting(curves._patient_client(self.uri))

    curves.Curves.add = synchronous


def stored_wrongly(store) -> None:
    """How a bucket could be used wrongly."""
    put_folder, put_new = store.put_folder, store.S3Store.put_new

    def manifest_first(place, name, files):
        if asked("sabotage") != "the manifest first":
            return put_folder(place, name, files)
        files = list(files)
        place.delete([f"{name}/{store.MANIFEST}"])
        listed = {path.name: store.artifact.listed(path) for path in files}
        place.put_new(f"{name}/{store.MANIFEST}", store.artifact.manifest(listed).encode())
        for path in files:
            place.put_file(f"{name}/{path.name}", path)

    def taken(self, name, content):
        if asked("sabotage") != "a lost answer is another's":
            return put_new(self, name, content)
        try:
            self.put(name, content, IfNoneMatch="*")
        except store.ClientError as error:
            raise store.Exists(name) from error

    if asked("sabotage") == "gives up at once":
        impatient = store.Config(retries={"mode": "standard", "total_max_attempts": 1})
        store.S3Store.__init__.__defaults__ = (impatient,)
    store.put_folder, store.S3Store.put_new = manifest_first, taken


def looks_at_no_bucket(bucket) -> None:
    """A start that looks at nothing first."""
    check = bucket.check

    def skipped(field, url):
        if asked("sabotage") != "looks at no bucket":
            check(field, url)

    bucket.check = skipped


CHANGES = {
    "cluster.store": (stored_wrongly,),
    "cluster.bucket": (looks_at_no_bucket,),
    "cluster.fit": (witness, resumed_wrongly, stopped_wrongly),
    "cluster.harvest": (late, held),
    "cluster.curves": (waits_for_the_tracker,),
}


class Changed(Loader):
    """A module's own loader, and then the changes."""

    def __init__(self, loader: Loader, name: str):
        self.loader, self.name = loader, name

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module) -> None:
        self.loader.exec_module(module)
        for change in CHANGES[self.name]:
            change(module)


class Finder(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name not in CHANGES:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = Changed(spec.loader, name)
        return spec


if "CHAOS" in os.environ:
    sys.meta_path.insert(0, Finder())
