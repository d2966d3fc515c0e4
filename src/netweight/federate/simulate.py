"""A simulation of many clients on one machine, by Flower's engine on Ray.

Flower gives a task to whichever of its actors is free, and a client must remember what it was asked: its secrets of a
round, and what its rows have cost. So clients live in actors of their own here, and Flower's only pass tasks on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from netweight.connect import connected, cores
from netweight.errors import OptionError, RunError
from netweight.federate.home import Home
from netweight.federate.kinds import WIRE
from netweight.quiet import flower
from netweight.run.federated import Client
from netweight.run.federated.flower import FlowerChannel, Node
from netweight.run.federated.wire import Wire

_START = 120.0  # seconds until the engine must be there


@contextmanager
def simulated(
    clients: Sequence[Client], folder: Path | None = None, cpus: float = 1.0, wire: Wire = WIRE
) -> Iterator[FlowerChannel]:
    """A channel to clients that live in Ray actors, while the block runs.

    Args:
        clients: each lives in one actor, which is handed its rows once; actors share the clients between them.
        folder: what clients keep between rounds, one subfolder for each; None uses a temporary one.
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
        count = max(1, min(int(cores()[1] / cpus), len(named)))
        # Flower's actors reserve the CPUs, and wait for these while they compute.
        homes = [ray.remote(num_cpus=0)(Home).remote(wire) for _ in range(count)]
        held = {name: homes[i % count] for i, name in enumerate(named)}
        ray.get([held[n].add.remote(Client(n, c.data, base / n, c.expects, c.limit)) for n, c in named.items()])
        engine = _Engine(held, cpus)
        try:
            grid = engine.start()
            nodes = {name: Node(i) for name, i in zip(named, sorted(grid.get_node_ids()), strict=True)}
            yield FlowerChannel(grid, lambda: nodes, wire)
        finally:
            engine.stop()  # and with it Ray, and whoever lives there


class _Engine:
    """Flower's simulation in a thread; its ServerApp does nothing but hand its grid over and wait for the end."""

    def __init__(self, held: dict[str, Any], cpus: float) -> None:
        self.held, self.cpus = held, cpus
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
        held = self.held

        def query(message: Any, context: Any) -> Any:
            # In an actor of Flower's: it names nothing of this module, which would import torch there.
            import ray
            from flwr.app import Message

            name = message.content.config_records["to"]["client"]
            return Message(ray.get(held[name].answer.remote(name, message.content)), reply_to=message)

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
