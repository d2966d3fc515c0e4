"""The server's side of a deployment: Flower's fleet service over gRPC, and its Grid in the same process.

Flower's own SuperLink (1.42) starts a Python process for each message, from an app bundle, and speaks HTTPS. Here its
parts are put together without that: its link state, its fleet service for gRPC with TLS, its check of clients'
signatures, and its Grid, which calls the handlers of that state instead of a web service.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from netweight.errors import OptionError
from netweight.federate.keys import ServerKeys
from netweight.federate.kinds import WIRE
from netweight.quiet import flower
from netweight.run.federated.flower import FlowerChannel, Node, misnamed
from netweight.run.federated.wire import Wire

MESSAGE = 64 << 20  # bytes of one gRPC message; Flower cuts tensors into pieces of 5 MiB
_THREADS = 64
_EACH = 4  # calls of one client at a time: Flower sends two parts of a message at once; signs of life, and one to spare
_BEAT = 20.0  # seconds between signs of life of the run, which Flower ends after 60 without
NAME = "netweight-client-bin"  # in the metadata of a call: what a client calls itself
_LINES = 100  # on clients that were not let in: anybody may knock


@contextmanager
def listening(
    address: str,
    keys: ServerKeys,
    wire: Wire = WIRE,
    patience: float = 60.0,
    said: Callable[[str], None] | None = None,
) -> Iterator[FlowerChannel]:
    """A channel to the clients that connect to `address` (HOST:PORT), while the block runs. `said` is told who was not
    let in.

    At its end clients that are there are told so. Raises OptionError where the address cannot be listened on, or where
    certificate and key do not fit.
    """
    flower()
    link = _Link(keys, said or (lambda _: None), 2 * wire.most)  # Flower adds to a message, but not as much again
    server = link.serve(address)
    try:
        yield FlowerChannel(link.grid, link.nodes, wire, patience, remembers=True)
    finally:
        link.stop.set()
        server.stop(grace=1).wait()


class _Link:
    """Flower's state of one run, and the nodes that may take part. `most` bytes of each are taken for one task."""

    def __init__(self, keys: ServerKeys, said: Callable[[str], None], most: int) -> None:
        from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, SUPERLINK_NODE_ID
        from flwr.server.superlink.linkstate import LinkStateFactory
        from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID, TaskType
        from flwr.supercore.object_store import ObjectStoreFactory
        from flwr.supercore.task_identity import TaskIdentity
        from flwr.superlink.federation import NoOpFederationManager

        self.keys, self.said, self.lines, self.most = keys, said, set[str](), most
        self.objects = ObjectStoreFactory()
        self.factory = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), self.objects)
        self.state: Any = self.factory.state()
        self.run_id = self.state.create_run(
            None, None, None, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
        )
        run = self.state.get_run_info(run_ids=[self.run_id])[0]
        self.task = run.primary_task_id
        self.state.claim_task(self.task)
        self.state.activate_task(self.task)
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = self.run_id, SUPERLINK_NODE_ID, self.task
        self.names = {
            self.state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, public, 0, name=name): name
            for name, public in keys.clients.items()
        }
        self.sessions: dict[int, int] = {}
        self.received: Counter[int] = Counter()  # bytes by node, since it was given a task
        self.grid = _grid(self.state, run)
        self.stop = threading.Event()

    def nodes(self) -> Mapping[str, Node]:
        """Those that are connected now, by name."""
        return {self.names[i]: Node(i, self.sessions.get(i, 0)) for i in self.grid.get_node_ids() if i in self.names}

    def turned_away(self, name: str, why: str) -> None:
        """Say, once, that a client was not let in."""
        line = f"{name[:64]!r} was not let in: {why}"
        if line not in self.lines and len(self.lines) < _LINES:
            self.lines.add(line)
            self.said(line)

    def serve(self, address: str) -> Any:
        """The gRPC server, started."""
        from flwr.proto.fleet_pb2_grpc import add_FleetServicer_to_server
        from flwr.server.superlink.fleet.grpc_rere.node_auth_server_interceptor import NodeAuthServerInterceptor
        from flwr.supercore.address import is_port_in_use, parse_address
        from flwr.supercore.grpc import generic_create_grpc_server
        from flwr.supercore.interceptors import RpcErrorTranslationServerInterceptor

        if parse_address(address) is None:
            raise OptionError(f"address is {address!r}; use HOST:PORT, such as 0.0.0.0:9092.")
        if is_port_in_use(address):
            raise OptionError(f"{address} is taken by another program, or is no address of this machine; use another.")
        try:
            server = generic_create_grpc_server(
                (_servicer(self), add_FleetServicer_to_server),
                address,
                max_concurrent_workers=_THREADS + _EACH * len(self.names),
                max_message_length=MESSAGE,
                certificates=(self.keys.authority, self.keys.certificate, self.keys.key),
                interceptors=[RpcErrorTranslationServerInterceptor(), NodeAuthServerInterceptor(self.factory)],
            )
            server.start()
        except RuntimeError as problem:
            raise OptionError(f"no server can listen on {address} with these certificates: {problem}") from None
        threading.Thread(target=self._live, daemon=True).start()
        return server

    def _live(self) -> None:
        while not self.stop.wait(_BEAT):
            self.state.acknowledge_task_heartbeat(self.task)


def _servicer(link: _Link) -> Any:
    from flwr.common.constant import PUBLIC_KEY_HEADER
    from flwr.proto.message_pb2 import PushObjectResponse
    from flwr.server.superlink.fleet.grpc_rere.fleet_servicer import FleetServicer
    from flwr.supercore.utils import get_metadata_bytes
    from grpc import StatusCode

    def caller(context: Any) -> bytes:
        """The public key whose signature Flower's interceptor has checked."""
        key: bytes = get_metadata_bytes(context.invocation_metadata(), PUBLIC_KEY_HEADER)
        return key

    class Fleet(FleetServicer):  # type: ignore[misc]
        """Flower's service with four changes. A client that was killed and is back is let in at once, and counted as a
        new session, instead of being turned away until its old one has timed out. Who calls must be who a request
        speaks of: Flower's interceptor compares neither the key to activate nor the sources of messages with the
        caller. Who is not let in is told why, and so is the server. And an answer has an end: more is not kept."""

        def ActivateNode(self, request: Any, context: Any) -> Any:  # noqa: N802
            if request.public_key != caller(context):
                context.abort(StatusCode.UNAUTHENTICATED, "the key to let in is not the key that signed")
            node = link.state.get_node_id_by_public_key(request.public_key)
            said = get_metadata_bytes(context.invocation_metadata(), NAME)
            called = said.decode(errors="replace") if said else ""
            if node is None:
                link.turned_away(called, "its public key is not among those of the server's clients.")
            else:
                if why := called and misnamed(link.names[node], called):
                    link.turned_away(called, why)
                    context.abort(StatusCode.PERMISSION_DENIED, why)
                link.state.deactivate_node(node)
                link.sessions[node] = link.sessions.get(node, 0) + 1
            return super().ActivateNode(request, context)

        def PushMessages(self, request: Any, context: Any) -> Any:  # noqa: N802
            node = link.state.get_node_id_by_public_key(caller(context))
            if any(message.metadata.src_node_id != node for message in request.messages_list):
                context.abort(StatusCode.UNAUTHENTICATED, "a client answers for itself only")
            return super().PushMessages(request, context)

        def PullMessages(self, request: Any, context: Any) -> Any:  # noqa: N802
            given = super().PullMessages(request, context)
            if given.messages_list:
                link.received[request.node.node_id] = 0
            return given

        def PushObject(self, request: Any, context: Any) -> Any:  # noqa: N802
            link.received[request.node.node_id] += len(request.object_content)
            if link.received[request.node.node_id] > link.most:
                return PushObjectResponse(stored=False)
            return super().PushObject(request, context)

    return Fleet(link.factory, link.objects, enable_supernode_auth=True)


def _grid(state: Any, run: Any) -> Any:
    from flwr.proto.task_pb2 import Task
    from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
    from flwr.supercore.object_store import NoObjectInStoreError
    from flwr.superlink.grid.http_grid import HttpGrid
    from flwr.superlink.servicer.runtime import runtime_handlers

    task = Task(run_id=run.run_id)
    begun = set[str]()

    def due(asked: str) -> bool:
        """Whether Flower can say at once what became of a message: its answer is there with all its parts, or it is
        lost. It is made lost where its answer broke off, since what is lost is asked again."""
        parts: list[bytes | None] = []
        # Under this lock an answer is entered with its parts. Flower drops those of an upload that broke off under it
        # too, but takes that of uploads first, and to enter one second: not held here, each could wait for the other.
        with state.lock, suppress(NoObjectInStoreError):
            if answer := state.message_ins_id_to_message_res_id.get(asked):
                begun.add(asked)
                tree = state.object_store.get_object_tree(answer)
                parts = [state.get_object(run.run_id, part.object_id) for part in iterate_object_tree(tree)]
        if b"" in parts:
            return False
        if asked in begun and (None in parts or not parts):
            state.delete_messages({asked})
        begun.discard(asked)
        sent = state.message_ins_store.get(asked)
        gone = sent is None or state.nodes[sent.metadata.dst_node_id].online_until < time.time()
        return bool(parts or gone)

    class Here:
        """The calls that Flower's Grid makes of a web service, answered by the handlers behind it."""

        def __getattr__(self, call: str) -> Any:
            handler = getattr(runtime_handlers, _CALLS[call])
            return lambda request: handler(request, state, task)

    class Grid(HttpGrid):  # type: ignore[misc]
        """Flower's Grid over a state in this process."""

        def pull_messages(self, message_ids: Iterable[str]) -> Any:
            """Of an answer that is still on its way nothing: Flower would wait for the rest, up to two hours, and hear
            nobody else."""
            there = [asked for asked in message_ids if due(asked)]
            return super().pull_messages(there) if there else []

        @property
        def _runtime_client(self) -> Any:
            return Here()

    grid = Grid(token="unused")
    grid.set_run(run)
    return grid


_CALLS = {
    "GetNodes": "get_nodes",
    "PushMessages": "push_messages",
    "PullMessages": "pull_messages",
    "PushObject": "push_object",
    "PullObject": "pull_object",
    "ConfirmMessageReceived": "confirm_message_received",
}
