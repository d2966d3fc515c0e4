"""A simulation of many clients on one machine, by Flower's engine on Ray: each task is computed in an actor."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from netweight.connect import connected
from netweight.errors import OptionError, RunError
from netweight.federate.kinds import WIRE
from netweight.quiet import flower
from netweight.run.federated import Client
from netweight.run.federated.flower import FlowerChannel, Node, addressee, answered
from netweight.run.federated.wire import Wire

_START = 120.0  # seconds until the engine must be there


@contextmanager
def simulated(
    clients: Sequence[Client], folder: Path | None = None, cpus: float = 1.0, wire: Wire = WIRE
) -> Iterator[FlowerChannel]:
    """A channel to clients that Ray actors compute, while the block runs.

    Args:
        clients: their rows are handed to the actors once; what they keep between rounds lies in `folder`.
        folder: one subfolder for each client; None uses a temporary one.
        cpus: of each actor; their number is what this machine has, divided by it.

    Raises OptionError where two clients bear one name, MissingExtra without Flower or Ray, RunError where the engine
    does not start.
    """
    named = {client.name: client for client in sorted(clients, key=lambda c: c.name)}
    if len(named) < len(clients):
        raise OptionError(f"{len(clients)} clients bear {len(named)} names; give each its own.")
    flower()
    with TemporaryDirectory(prefix="netweight-clients-") as temporary, connected("local"):
        import ray

        base = folder or Path(temporary)
        held = {n: ray.put(Client(n, c.data, base / n, c.expects, c.limit)) for n, c in named.items()}
        engine = _Engine(held, cpus, wire)
        try:
            grid = engine.start()
            nodes = {name: Node(i) for name, i in zip(named, sorted(grid.get_node_ids()), strict=True)}
            yield FlowerChannel(grid, lambda: nodes, wire)
        finally:
            engine.stop()


class _Engine:
    """Flower's simulation in a thread; its ServerApp does nothing but hand its grid over and wait for the end."""

    def __init__(self, held: dict[str, Any], cpus: float, wire: Wire) -> None:
        self.held, self.cpus, self.wire = held, cpus, wire
        self.there, self.end = threading.Event(), threading.Event()
        self.grid: Any = None
        self.problem: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> Any:
        self.thread.start()
        if not self.there.wait(_START) or self.grid is None:
            raise RunError(f"Flower's simulation did not start: {self.problem or f'nothing came in {_START:g} s'}.")
        while len(list(self.grid.get_node_ids())) < len(self.held) and self.problem is None:
            time.sleep(0.05)  # the ServerApp starts before the nodes are there
        return self.grid

    def stop(self) -> None:
        self.end.set()
        self.thread.join(_START)

    def _run(self) -> None:
        from flwr.clientapp import ClientApp
        from flwr.serverapp import ServerApp
        from flwr.simulation import run_simulation

        client_app, server_app = ClientApp(), ServerApp()
        held, wire = self.held, self.wire

        def query(message: Any, context: Any) -> Any:
            return _query(held, wire, message)

        def main(grid: Any, context: Any) -> None:
            self.grid = grid
            self.there.set()
            self.end.wait()

        client_app.query()(query)
        server_app.main()(main)
        resources = {"num_cpus": self.cpus, "num_gpus": 0.0}
        try:
            run_simulation(server_app, client_app, len(held), backend_config={"client_resources": resources})
        except BaseException as problem:  # whoever waits must hear of it
            self.problem = problem
        finally:
            self.there.set()


def _query(held: dict[str, Any], wire: Wire, message: Any) -> Any:
    """In an actor: the answer of the client to which a message was sent."""
    from flwr.app import Message

    flower()
    torch.set_num_threads(1)
    client = _client(held[addressee(message.content)])
    return Message(answered(client, wire, message.content), reply_to=message)


@lru_cache(maxsize=8)
def _client(held: Any) -> Client:
    import ray

    client: Client = ray.get(held)
    return client
