"""The client's side of a deployment: it asks the server for tasks over gRPC, and answers them.

A client opens connections and listens on nothing. The server is checked against the authority's certificate; every call
carries a signature of the client's key.
"""

from __future__ import annotations

import random
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from netweight.errors import ClientError, EndpointError, OptionError
from netweight.federate.keys import ClientKeys
from netweight.federate.kinds import WIRE
from netweight.federate.link import MESSAGE, NAME
from netweight.quiet import flower
from netweight.run.federated import Client
from netweight.run.federated.flower import Memory, answered, ended
from netweight.run.federated.wire import Wire

_INTERVAL = 20  # seconds; after twice as long without a sign of life Flower takes a client for gone
_BEAT = 4.0  # seconds between signs of life: a machine that is busy with training may be late with some
_LOOK = 0.25
_RETRY = (0.5, 8.0)  # seconds between attempts, first and last
_WORTH_SAYING = 1.0  # seconds of a task


class Connection:
    """A client's connection to a server.

    Args:
        address: HOST:PORT of the server.
        patience: seconds that the server may be away; then EndpointError.
        said: told in a sentence what happens.
    """

    def __init__(
        self, address: str, keys: ClientKeys, patience: float = 300.0, said: Callable[[str], None] | None = None
    ) -> None:
        flower()
        self.address, self.keys, self.patience = address, keys, patience
        self.said = said or (lambda _: None)
        self.name = ""
        self.node: Any = None
        self.memory = Memory()
        self.stub = self._stub()

    def serve(self, client: Client, wire: Wire = WIRE) -> None:
        """Answer tasks until the server ends the run.

        Raises EndpointError (nobody answers, or its certificate does not match), ClientError (the server does not know
        this key, or by another name, or has refused the client: the text says why).
        """
        self.name = client.name
        reachable(self.address, self.keys.authority, min(self.patience, 30.0))
        self._retried(self.activate)
        self.said(f"{client.name} is connected to {self.address}")
        end = threading.Event()
        threading.Thread(target=self._beat, args=(end,), daemon=True).start()
        try:
            while True:
                message = self._retried(self._pull)
                if message is None:
                    time.sleep(_LOOK)
                    continue
                why = ended(message.content)
                if why:
                    raise ClientError(why)
                if why is not None:  # nobody waits for an answer to that, nor may be there for one
                    self.said("the server has ended the run")
                    return
                self._answer(client, wire, message)
        finally:
            end.set()
            self._leave()

    def activate(self) -> None:
        """Say that this client is there. Raises ClientError where the server does not know its key, or by another
        name."""
        import grpc
        from flwr.proto.fleet_pb2 import ActivateNodeRequest
        from flwr.proto.node_pb2 import Node

        request = ActivateNodeRequest(public_key=self._public(), heartbeat_interval=_INTERVAL)
        try:
            called = [(NAME, self.name.encode())]
            self.node = Node(node_id=self.stub.ActivateNode(request, timeout=30, metadata=called).node_id)
        except grpc.RpcError as problem:
            if problem.code() is grpc.StatusCode.PERMISSION_DENIED:
                raise ClientError(problem.details()) from None
            if problem.code() not in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.FAILED_PRECONDITION):
                raise
            raise ClientError(
                f"the server at {self.address} does not let this client in ({problem.details()}): its public key must "
                "lie among the server's clients, and its clock must be less than 5 seconds ahead of the server's and "
                "less than 305 behind it."
            ) from None

    def _answer(self, client: Client, wire: Wire, message: Any) -> None:
        from flwr.app import Message

        began = time.monotonic()
        reply = Message(answered(client, wire, message.content, self.memory), reply_to=message)
        took = time.monotonic() - began
        if took >= _WORTH_SAYING:
            self.said(f"{client.name} answered a task in {took:.1f} s")
        self._retried(lambda: self._push(reply))

    def _pull(self) -> Any:
        """The next task, or None."""
        from flwr.common.serde import message_from_proto
        from flwr.proto.fleet_pb2 import PullMessagesRequest
        from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
        from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
        from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
        from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects

        came = self.stub.PullMessages(PullMessagesRequest(node=self.node))
        if not came.messages_list:
            return None
        run_id = message_from_proto(came.messages_list[0]).metadata.run_id
        ids = [tree.object_id for tree in iterate_object_tree(came.message_object_trees[0])]
        contents = pull_objects(ids, make_pull_object_fn_protobuf(self.stub.PullObject, self.node, run_id))
        self.stub.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(node=self.node, run_id=run_id, message_object_id=ids[-1])
        )
        message = inflate_object_from_contents(came.messages_list[0].metadata.message_id, contents)
        message.metadata.__dict__["_message_id"] = came.messages_list[0].metadata.message_id
        return message

    def _push(self, reply: Any) -> None:
        from flwr.app.message import remove_content_from_message
        from flwr.common.serde import message_to_proto
        from flwr.proto.fleet_pb2 import PushMessagesRequest
        from flwr.supercore.inflatable.inflatable_object import (
            get_all_nested_objects,
            get_object_tree,
            no_object_id_recompute,
        )
        from flwr.supercore.inflatable.inflatable_protobuf_utils import make_push_object_fn_protobuf
        from flwr.supercore.inflatable.inflatable_utils import push_objects

        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            request = PushMessagesRequest(
                node=self.node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[get_object_tree(reply)],
                clientapp_runtime_list=[0.0],
            )
            taken = self.stub.PushMessages(request)
            push = make_push_object_fn_protobuf(
                self.stub.PushObject, self.node, reply.metadata.run_id, taken.session_id
            )
            push_objects(get_all_nested_objects(reply), push, object_ids_to_push=set(taken.objects_to_push))

    def _retried(self, call: Callable[[], Any]) -> Any:
        """The result of a call, or None where it was given up: the server was away, too busy, or has no memory of this
        client. Then the client says anew that it is there, as often as it takes, and its task is asked again. (The call
        itself is not made again: it may have taken a task with it, which is handed out once.)"""
        import grpc
        from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectPushError

        began, delay = time.monotonic(), _RETRY[0]
        try:
            return call()
        except (ObjectPullError, ObjectPushError):
            return None
        except grpc.RpcError as problem:
            code, details = problem.code(), problem.details()
        if code not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNAUTHENTICATED):
            self.said(f"the server turned a call down ({details})")
        while time.monotonic() - began <= self.patience:
            time.sleep(delay * random.uniform(0.8, 1.2))
            delay = min(2 * delay, _RETRY[1])
            try:
                self.activate()
                self.said(f"connected to {self.address} again")
                return None
            except grpc.RpcError as problem:
                details = problem.details()
        raise EndpointError(f"the server at {self.address} is away for {self.patience:g} s ({details}).")

    def _beat(self, end: threading.Event) -> None:
        """Say every few seconds that this client is alive; Flower's own sender takes 20, whatever was agreed on."""
        import grpc
        from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest

        while not end.wait(_BEAT):
            with suppress(grpc.RpcError):  # whoever pulls finds out
                request = SendNodeHeartbeatRequest(node=self.node, heartbeat_interval=_INTERVAL)
                self.stub.SendNodeHeartbeat(request, timeout=10)

    def _leave(self) -> None:
        import grpc
        from flwr.proto.fleet_pb2 import DeactivateNodeRequest

        with suppress(grpc.RpcError):
            self.stub.DeactivateNode(DeactivateNodeRequest(node_id=self.node.node_id), timeout=2)

    def _public(self) -> bytes:
        from flwr.supercore.primitives.asymmetric import bytes_to_private_key, public_key_to_bytes

        made: bytes = public_key_to_bytes(bytes_to_private_key(self.keys.key).public_key())
        return made

    def _stub(self) -> Any:
        import grpc
        from flwr.common.constant import PUBLIC_KEY_HEADER, SIGNATURE_HEADER, TIMESTAMP_HEADER
        from flwr.proto.fleet_pb2_grpc import FleetStub
        from flwr.supercore.date import now
        from flwr.supercore.grpc import create_channel
        from flwr.supercore.primitives.asymmetric import bytes_to_private_key, sign_message

        private, public = bytes_to_private_key(self.keys.key), self._public()

        class Sign(grpc.UnaryUnaryClientInterceptor):  # type: ignore[misc]
            """Adds to each call what the server's interceptor of Flower checks."""

            def intercept_unary_unary(self, go_on: Any, details: Any, request: Any) -> Any:
                stamp = now().isoformat()
                signed = sign_message(private, stamp.encode("ascii"))
                more = [(PUBLIC_KEY_HEADER, public), (TIMESTAMP_HEADER, stamp), (SIGNATURE_HEADER, signed)]
                return go_on(details._replace(metadata=[*(details.metadata or ()), *more]), request)

        return FleetStub(create_channel(self.address, False, self.keys.authority, MESSAGE, [Sign()]))


def reachable(address: str, authority: bytes, seconds: float) -> None:
    """Wait until a server speaks TLS at an address. Raises OptionError for no address, EndpointError where nobody is
    there after `seconds`, and at once where its certificate is not one of this authority for this host."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdigit():
        raise OptionError(f"the server is {address!r}; use HOST:PORT, such as federation.example.com:9092.")
    context = ssl.create_default_context(cadata=authority.decode("ascii"))
    # Default from Python 3.13 on; but authorities that were made before do not say what their key is for.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    context.set_alpn_protocols(["h2"])
    end = time.monotonic() + seconds
    while True:
        try:
            plain = socket.create_connection((host, int(port)), timeout=10)
            with plain, context.wrap_socket(plain, server_hostname=host):
                return
        except ssl.SSLCertVerificationError as problem:
            raise EndpointError(
                f"the certificate of the server at {address} does not match: {problem.verify_message}. Use the "
                "ca.crt of its keys, and an address that its certificate names."
            ) from None
        except (OSError, ssl.SSLError) as problem:
            if time.monotonic() >= end:
                raise EndpointError(
                    f"no server answers at {address} ({problem}); check the address, and that it has been started."
                ) from None
        time.sleep(0.5)
