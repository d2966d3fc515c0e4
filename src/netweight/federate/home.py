"""Where simulated clients live. Whoever holds a handle of a Ray actor imports this, so torch is imported inside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from netweight.quiet import flower

if TYPE_CHECKING:
    from netweight.run.federated import Client
    from netweight.run.federated.wire import Wire


class Home:
    """The body of an actor in which some of the clients live."""

    def __init__(self, wire: Wire) -> None:
        import torch

        flower()
        torch.set_num_threads(1)
        self.wire = wire
        self.clients: dict[str, Client] = {}

    def add(self, client: Client) -> None:
        """From now on it answers here."""
        self.clients[client.name] = client

    def answer(self, name: str, record: Any) -> Any:
        """The record of that client's answer."""
        from netweight.run.federated.flower import answered

        return answered(self.clients[name], self.wire, record)
