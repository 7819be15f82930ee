"""Which replica a request goes to."""

import asyncio
from types import SimpleNamespace

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID

from serve.deploy import build
from serve.router import HOT, LeastBusy
from serve.settings import Settings


def replica(name: str, *held: str) -> SimpleNamespace:
    return SimpleNamespace(
        replica_id=name, multiplexed_model_ids=set(held), node_id="", availability_zone=None, max_ongoing_requests=100
    )


@pytest.fixture
def router():
    """With two replicas: "a" holds the dictionary "x", "b" none."""

    async def make() -> LeastBusy:
        made = LeastBusy(DeploymentID("Dictionaries", "test"), DeploymentHandleSource.REPLICA)
        made.initialize_state()
        return made

    made = asyncio.run(make())
    made.replicas = [replica("a", "x"), replica("b")]
    return made


def chosen(router: LeastBusy, *arguments) -> str:
    request = SimpleNamespace(args=arguments, routing_context=SimpleNamespace(should_backoff=False))
    ranks = asyncio.run(router.choose_replicas(router.replicas, request))
    assert request.routing_context.should_backoff, "without it Ray asks again at once, for ever"
    assert sorted(one.replica_id for rank in ranks for one in rank) == ["a", "b"]
    return ranks[0][0].replica_id


def test_a_request_goes_to_who_has_its_dictionary_until_that_one_is_busy(router: LeastBusy) -> None:
    for _ in range(HOT):
        assert chosen(router, "x") == "a"
        router.on_send_request("a")
    assert chosen(router, "x") == "b"
    router.on_request_completed("a", "an id")
    router.on_request_completed("a", "another")
    assert chosen(router, "x") == "a"


def test_of_two_that_have_it_who_has_less_to_do(router: LeastBusy) -> None:
    router.replicas[1].multiplexed_model_ids.add("x")
    router.on_send_request("a")
    assert chosen(router, "x") == "b"
    router.on_send_request("b")
    router.on_request_completed("a", "an id")
    assert chosen(router, "x") == "a"


def test_a_dictionary_that_nobody_has_goes_to_who_has_the_fewest(router: LeastBusy) -> None:
    assert chosen(router, "y") == "b"
    router.on_send_request("b")
    assert chosen(router, "y") == "a"
    assert chosen(router) == "a"  # a question about no dictionary


def test_what_a_replica_had_to_do_is_forgotten_with_it(router: LeastBusy) -> None:
    router.on_send_request("a")
    router.on_send_request("b")
    asyncio.run(_update(router, [router.replicas[1]]))
    router.on_request_completed("a", "an id")
    assert router.inside["b"] == 1
    assert router.inside["a"] <= 0


async def _update(router: LeastBusy, replicas: list) -> None:
    router.update_replicas(replicas)


def test_the_replicas_of_dictionaries__are_chosen_by_it() -> None:
    """Without it the figures fall, and nothing else tells."""
    ingress = build(Settings(catalog="anywhere", insecure_local=True))
    (replicas,) = ingress._bound_deployment.init_args
    config = replicas._bound_deployment._deployment_config
    assert config.request_router_config.get_request_router_class() is LeastBusy
