"""Which replica a request goes to: who has least to do, and rather one that has the dictionary already."""

from collections import Counter
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

HOT = 2  # requests more, with which one that has the dictionary is passed over, and another has it then too


class LeastBusy(RequestRouter):
    """By what this process has sent to each and was not answered yet; the digest is a request's first argument.

    Ray's own adds up what replicas say when they take a request, and counts some twice: of two replicas one had nothing
    to do, for up to 10 s at a time (tests/bench/LOG.md).
    """

    def initialize_state(self, **_: Any) -> None:
        self.inside: Counter[ReplicaID] = Counter()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """One after another, to be asked in this order."""
        digest = None
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # if all of them are full
            digest = next(iter(pending_request.args), None)

        def cost(replica: RunningReplica) -> tuple[int, int]:
            held = replica.multiplexed_model_ids
            return self.inside[replica.replica_id] + (0 if digest in held else HOT), len(held)

        return [[replica] for replica in sorted(candidate_replicas, key=cost)]

    def on_send_request(self, replica_id: ReplicaID) -> None:
        super().on_send_request(replica_id)
        self.inside[replica_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self.inside[replica_id] -= 1

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        there = {replica.replica_id for replica in replicas}
        self.inside = Counter({replica_id: self.inside[replica_id] for replica_id in there})
