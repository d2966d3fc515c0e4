"""Secure aggregation: a server learns the sum of its clients' vectors and nothing else of them (Bonawitz et al., CCS
2017, the protocol for an honest but curious server).

Four rounds, each a pure step of a `Member` (a client) or a function of the server, so that any transport carries them:

    advertise   each client sends two fresh public keys
    share       each sends every other one a sealed share of its two secrets
    mask        each sends its vector plus masks; those of a pair of clients cancel in the sum
    unmask      the survivors send shares with which the server takes away what did not cancel

Whoever leaves after `share` is made up for, as long as `threshold` clients are left. More than in the paper, each
client vouches for the shares that it deals (`Deal`), so that who tells a false one is known. Masks are AES-256 in
counter mode under keys that no two rounds share; a generator for simulations (Philox, Mersenne twister) would not do,
since part of its output tells the rest. Vectors are integers modulo 2^32 (`Fixed`).
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from netweight.errors import MissingExtra, OptionError, RunError

try:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from cryptography.hazmat.primitives.ciphers.algorithms import AES
    from cryptography.hazmat.primitives.ciphers.modes import CTR
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF
except ImportError:
    raise MissingExtra("secure aggregation", "federated") from None

Words = NDArray[np.uint32]
_PRIME = 2**521 - 1  # shares are numbers below it; secrets are below 2^256
SHARE = 66  # bytes of a share
SEALED = 12 + 2 * SHARE + 16  # bytes of two under AES-GCM, with nonce and tag
DIGEST = 32  # bytes
_MASK = b"netweight mask"
_LEAST = 2  # clients whose sum may be seen


@dataclass(frozen=True)
class Fixed:
    """Numbers of size at most `range` as integers, of which `clients` can be added up without overflow modulo 2^32.

    The step is range * clients / (2^31 - clients): rounding costs half of it for each client.
    """

    range: float
    clients: int

    def __post_init__(self) -> None:
        if not (self.range > 0 and math.isfinite(self.range) and 1 <= self.clients < 2**16):
            raise OptionError(
                f"fixed point of range {self.range} for {self.clients} clients: the range must be a number above 0, "
                "the clients 1 to 65,535."
            )

    @property
    def step(self) -> float:
        """The distance of two neighbouring numbers."""
        return self.range * self.clients / (2**31 - self.clients)

    def encode(self, values: NDArray[np.float64]) -> Words:
        """Raises OptionError for what is not finite, or too large: it would come out as another number."""
        largest = float(np.abs(values).max(initial=0.0))
        if not math.isfinite(largest):
            raise OptionError("the update has values that are not finite; lower the learning rate.")
        if largest > self.range:
            raise OptionError(
                f"the update has a value of {largest:.4g}, beyond the range of {self.range:g} that its encoding holds; "
                "lower the learning rate, or raise the range."
            )
        return np.rint(values / self.step).astype(np.int64).astype(np.uint32)

    def decode(self, words: Words) -> NDArray[np.float64]:
        """The sum that encoded vectors add up to."""
        return words.view(np.int32).astype(np.float64) * self.step


@dataclass(frozen=True)
class Keys:
    """Public keys (X25519, 32 bytes each): one for sealing shares, one for masks."""

    seal: bytes
    mask: bytes


@dataclass(frozen=True)
class Deal:
    """What a client sends in round 2: sealed shares, by receiver; digests (SHA-256) of the two shares that each client
    holds, its own among them; and that of its seed. Its mask key has a public one.

    Shares and seeds are random numbers of 256 bits and more, so that digests tell nothing of them."""

    sealed: Mapping[str, bytes]
    digests: Mapping[str, bytes]
    seed: bytes


@dataclass(frozen=True)
class Shares:
    """What a client tells of others in the end: of those that sent a vector the share of the seed of their own mask, of
    those that vanished the share of their mask key. Never both of one."""

    seeds: Mapping[str, bytes]
    keys: Mapping[str, bytes]


class Member:
    """A client in one aggregation; a new one is made for each.

    Args:
        name: of this client, as everyone knows it.
        threshold: how many must be left in the end.

    Each step raises OptionError where it is asked out of order, or what would show a vector.
    """

    def __init__(self, name: str, threshold: int) -> None:
        self.name, self.threshold = name, threshold
        self._seal, self._mask = X25519PrivateKey.generate(), X25519PrivateKey.generate()
        self._seed = secrets.token_bytes(32)
        self._all: dict[str, Keys] = {}
        self._held: dict[str, bytes] = {}
        self._sent = b""  # the SHA-256 of what was masked
        self._told = False

    @property
    def least(self) -> int:
        """How many clients' vectors a sum holds that can be seen; 0 before it is known who they are."""
        return self.threshold if self._all else 0

    def advertise(self) -> Keys:
        """Round 1: this client's public keys."""
        return Keys(_public(self._seal), _public(self._mask))

    def share(self, everyone: Mapping[str, Keys]) -> Deal:
        """Round 2: a sealed share of both secrets for each other client, by name; `everyone` includes this one."""
        if self._all:
            raise OptionError(f"{self.name} has shared its secrets already; a new aggregation needs new keys.")
        if everyone.get(self.name) != self.advertise():
            raise OptionError(f"{self.name} is not among those that aggregate, or with other keys.")
        if len(everyone) < max(self.threshold, _LEAST):
            raise OptionError(
                f"{len(everyone)} clients for secure aggregation, and {max(self.threshold, _LEAST)} must be left in "
                "the end; wait for more clients, or turn secure aggregation off."
            )
        if len({k.mask for k in everyone.values()} | {k.seal for k in everyone.values()}) < 2 * len(everyone):
            raise OptionError("two clients sent one key; secure aggregation needs a key of its own from each.")
        self._all = dict(everyone)
        names = sorted(everyone)
        seeds = split(self._seed, len(names), self.threshold)
        keys = split(self._mask.private_bytes_raw(), len(names), self.threshold)
        parts = {name: seed + key for name, seed, key in zip(names, seeds, keys, strict=True)}
        digests = {name: _digests(part, f"{self.name}>{name}") for name, part in parts.items()}
        self._held[self.name] = parts.pop(self.name)
        sealed = {name: _seal(self._sealing(name), part, f"{self.name}>{name}") for name, part in parts.items()}
        return Deal(sealed, digests, _digest(self._seed, self.name))

    def masked(self, words: Words, received: Mapping[str, tuple[bytes, bytes]]) -> Words:
        """Round 3: the vector under this client's masks; a second time only the same one. `received` are sealed shares
        and their digests, by the client that they are from; who sent none takes no part from here on."""
        this = hashlib.sha256(words.tobytes() + repr(sorted(received.items())).encode()).digest()
        if not self._all or self._sent not in (b"", this):
            raise OptionError(f"{self.name} is asked for a vector out of order: once, after shares are exchanged.")
        for name, (part, digests) in received.items():
            if name not in self._all or name == self.name:
                raise OptionError(f"{self.name} got shares of {name}, which does not take part.")
            self._held[name] = _open(self._sealing(name), part, f"{name}>{self.name}")
            if _digests(self._held[name], f"{name}>{self.name}") != digests:
                raise RunError(f"{name} vouches for other shares than it dealt; begin the round again without it.")
        if len(self._held) < self.threshold:
            raise OptionError(
                f"{len(self._held)} clients have shared their secrets, and {self.threshold} must be left in the end; "
                "begin the round again."
            )
        total = words + mask(self._seed, len(words))
        for name in self._held:
            if name != self.name:
                total = _paired(total, self.name, name, self._between(name))
        self._sent = this
        return total

    def unmask(self, survivors: frozenset[str]) -> Shares:
        """Round 4: shares of the seeds of those that sent a vector, and of the keys of those that did not."""
        if not self._sent:
            raise OptionError(f"{self.name} has sent no vector; there is nothing to take masks from.")
        if self._told:
            # A second answer for other survivors would give both shares of some client, and so its vector.
            raise OptionError(f"{self.name} has told its shares already; a second time could show one client's vector.")
        if self.name not in survivors or not survivors <= set(self._held):
            raise OptionError(f"the survivors that {self.name} was told are not those that it shared secrets with.")
        if len(survivors) < self.threshold:
            raise OptionError(_too_few(len(survivors), self.threshold))
        self._told = True
        return Shares(
            {name: part[:SHARE] for name, part in self._held.items() if name in survivors},
            {name: part[SHARE:] for name, part in self._held.items() if name not in survivors},
        )

    def _sealing(self, other: str) -> bytes:
        return _agreed(self._seal, self._all[other].seal, b"netweight seal")

    def _between(self, other: str) -> bytes:
        return _agreed(self._mask, self._all[other].mask, _MASK)


def route(deals: Mapping[str, Deal], threshold: int) -> dict[str, dict[str, tuple[bytes, bytes]]]:
    """The server after round 2: what each client gets, by sender, of what those that are still there sent."""
    if len(deals) < threshold:
        raise RunError(_too_few(len(deals), threshold))
    # Who left a share out sends an empty one: its receiver says so.
    return {
        to: {name: (d.sealed.get(to, b""), d.digests.get(to, b"")) for name, d in deals.items() if name != to}
        for to in deals
    }


def are_dealt(teller: str, shares: Shares, deals: Mapping[str, Deal]) -> bool:
    """Whether what a client tells are the shares that the others vouch for."""
    told = ((n, part, slice(DIGEST), "seed") for n, part in shares.seeds.items())
    kept = ((n, part, slice(DIGEST, None), "key") for n, part in shares.keys.items())
    return all(_digest(p, f"{n}>{teller} {kind}") == deals[n].digests[teller][at] for n, p, at, kind in (*told, *kept))


def unmasked(
    total: Words,
    survivors: Collection[str],
    shares: Mapping[str, Shares],
    keys: Mapping[str, Keys],
    deals: Mapping[str, Deal],
    threshold: int,
) -> Words:
    """The server in the end: the sum of the survivors' vectors.

    Args:
        total: the sum of the survivors' masked vectors.
        survivors: those that sent one.
        shares: what they told, by name.
        keys: public keys of all that advertised (round 1).
        deals: of those that shared secrets (round 2).

    Raises RunError where fewer than `threshold` told their shares, or a share is not the one that was dealt.
    """
    if len(shares) < threshold or len(survivors) < threshold:
        raise RunError(_too_few(min(len(shares), len(survivors)), threshold))
    names = sorted(keys)
    told = sorted(shares)[:threshold]
    gone = sorted(set(deals) - set(survivors))
    for t in told:
        if set(shares[t].seeds) != set(survivors) or set(shares[t].keys) != set(gone):
            raise RunError(f"{t} told shares of others than it was asked for; begin the round again.")
        if not are_dealt(t, shares[t], deals):
            raise RunError(f"{t} told other shares than it was dealt; begin the round again without it.")
    for name in sorted(survivors):
        seed = join({names.index(t) + 1: shares[t].seeds[name] for t in told}, name)
        if _digest(seed, name) != deals[name].seed:
            raise RunError(_no_secret(name))
        total = total - mask(seed, len(total))
    for name in gone:
        at = {names.index(t) + 1: shares[t].keys[name] for t in told}
        private = X25519PrivateKey.from_private_bytes(join(at, name))
        if _public(private) != keys[name].mask:
            raise RunError(_no_secret(name))
        for other in sorted(survivors):
            # What `other` added for the pair is what `name` would have taken away.
            total = _paired(total, name, other, _agreed(private, keys[other].mask, _MASK))
    return total.astype(np.uint32)


def split(secret: bytes, shares: int, threshold: int) -> list[bytes]:
    """Shares of a secret of 32 bytes, of which any `threshold` give it back and fewer say nothing (Shamir, 1979):
    values at 1, 2, ... of a random polynomial modulo 2^521 - 1 whose value at 0 is the secret."""
    factors = [int.from_bytes(secret, "big"), *(secrets.randbelow(_PRIME) for _ in range(threshold - 1))]
    found = []
    for x in range(1, shares + 1):
        value = 0
        for factor in reversed(factors):
            value = (value * x + factor) % _PRIME
        found.append(value.to_bytes(SHARE, "big"))
    return found


def join(shares: Mapping[int, bytes], dealer: str) -> bytes:
    """The secret that shares, by their place from 1 on, stand for. Raises RunError where they stand for none."""
    total = 0
    for x, share in shares.items():
        above, below = 1, 1
        for other in shares:
            if other != x:
                above, below = above * other % _PRIME, below * (other - x) % _PRIME
        total += int.from_bytes(share, "big") * above * pow(below, -1, _PRIME)
    total %= _PRIME
    if total >= 2**256:
        raise RunError(_no_secret(dealer))
    return total.to_bytes(32, "big")


def mask(key: bytes, count: int) -> Words:
    """`count` words of the key stream of AES-256 in counter mode."""
    stream = Cipher(AES(key), CTR(bytes(16))).encryptor()
    return np.frombuffer(stream.update(bytes(4 * count)) + stream.finalize(), dtype="<u4").astype(np.uint32)


def _paired(total: Words, mine: str, other: str, between: bytes) -> Words:
    """The mask of a pair: whose name comes first adds it, the other takes it away."""
    drawn = mask(between, len(total))
    return total + drawn if mine < other else total - drawn


def _too_few(left: int, threshold: int) -> str:
    return (
        f"{left} clients are left for secure aggregation, and {threshold} are needed to take the masks away; nothing "
        "of their vectors can be read. Begin the round again with those that are there."
    )


def _no_secret(dealer: str) -> str:
    return f"the shares that {dealer} dealt do not stand for its secrets; begin the round again without it."


def _digest(secret: bytes, what: str) -> bytes:
    return hashlib.sha256(f"netweight {what}\0".encode() + secret).digest()


def _digests(part: bytes, way: str) -> bytes:
    """Of the two shares that go one way."""
    return _digest(part[:SHARE], f"{way} seed") + _digest(part[SHARE:], f"{way} key")


def _public(private: X25519PrivateKey) -> bytes:
    return private.public_key().public_bytes_raw()


def is_key(public: bytes) -> bool:
    """Whether others can agree on a key with the holder of this public one."""
    try:
        X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        return False
    return True


def _agreed(private: X25519PrivateKey, public: bytes, use: bytes) -> bytes:
    """A key of 32 bytes that both sides of a pair come to (RFC 7748), for one use (HKDF, RFC 5869)."""
    try:
        shared = private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise RunError("a client sent a public key that is none; begin the round again without it.") from None
    return HKDF(SHA256(), 32, None, use).derive(shared)


def _seal(key: bytes, part: bytes, way: str) -> bytes:
    """Authenticated encryption (AES-256-GCM) of shares on their way through the server."""
    nonce = secrets.token_bytes(12)
    return nonce + AESGCM(key).encrypt(nonce, part, way.encode())


def _open(key: bytes, sealed: bytes, way: str) -> bytes:
    try:
        part = AESGCM(key).decrypt(sealed[:12], sealed[12:], way.encode())
    except (InvalidTag, ValueError):
        raise RunError(f"sealed shares ({way}) were changed on their way; begin the round again.") from None
    if len(part) != 2 * SHARE:
        raise RunError(f"sealed shares ({way}) have {len(part)} bytes, not {2 * SHARE}; begin the round again.")
    return part
