"""Secure aggregation: exact sums, vanishing clients, and what nobody may learn."""

import copy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netweight.errors import MissingExtra, OptionError, RunError
from netweight.run.federated import secure
from netweight.run.federated.privacy import two_thirds
from netweight.run.federated.secure import (
    Deal,
    Fixed,
    Keys,
    Member,
    Shares,
    are_dealt,
    join,
    mask,
    route,
    split,
    unmasked,
)


def names_of(count):
    return [f"shop{i:02d}" for i in range(count)]


class Rounds:
    """One aggregation: all clients share, `gone` vanish afterwards, `late` after their vector was sent."""

    def __init__(self, vectors, threshold=None, absent=()):
        self.vectors = vectors
        self.threshold = threshold or two_thirds(len(vectors))
        self.members = {name: Member(name, self.threshold) for name in vectors}
        self.keys = {name: m.advertise() for name, m in self.members.items()}
        self.deals = {name: m.share(self.keys) for name, m in self.members.items() if name not in absent}
        self.routed = route(self.deals, self.threshold)

    def masked(self, gone=()):
        return {n: self.members[n].masked(self.vectors[n], self.routed[n]) for n in self.routed if n not in gone}

    def sum(self, gone=(), late=()):
        sent = self.masked(gone)
        shares = {n: self.members[n].unmask(frozenset(sent)) for n in sent if n not in late}
        return unmasked(plain(sent), list(sent), shares, self.keys, self.deals, self.threshold)


def vectors_of(count, length, seed=0):
    drawn = np.random.default_rng(seed)
    return {name: drawn.integers(0, 2**32, length, dtype=np.uint32) for name in names_of(count)}


def plain(vectors, gone=()):
    return sum((v for n, v in vectors.items() if n not in gone), np.zeros(1, np.uint32)).astype(np.uint32)


@settings(max_examples=15)
@given(st.integers(2, 9), st.integers(1, 40), st.data())
def test_the_sum_is_that_of_the_survivors(count, length, data):
    vectors = vectors_of(count, length, count)
    spare = count - two_thirds(count)
    lost = data.draw(st.lists(st.sampled_from(names_of(count)), max_size=spare, unique=True))
    cut = data.draw(st.integers(0, len(lost)))
    gone, late = lost[:cut], lost[cut:]
    assert (Rounds(vectors).sum(gone, late) == plain(vectors, gone)).all()


def test_a_fifth_of_the_clients_vanish_after_sharing():
    vectors = vectors_of(10, 500)
    gone = ("shop03", "shop07")
    assert (Rounds(vectors).sum(gone) == plain(vectors, gone)).all()


def test_who_never_shared_takes_no_part():
    vectors = vectors_of(5, 20)
    assert (Rounds(vectors, absent=("shop01",)).sum() == plain(vectors, ("shop01",))).all()


def test_fewer_than_the_threshold_are_refused():
    vectors = vectors_of(5, 8)
    rounds = Rounds(vectors)
    sent = rounds.masked(gone=("shop00", "shop01"))
    with pytest.raises(OptionError, match="3 clients are left for secure aggregation, and 4 are needed"):
        rounds.members["shop02"].unmask(frozenset(sent))
    with pytest.raises(RunError, match="3 clients are left .* nothing of their vectors can be read"):
        unmasked(plain(sent), list(sent), {n: Shares({}, {}) for n in sent}, rounds.keys, rounds.deals, 4)
    with pytest.raises(RunError, match="1 clients are left"):
        route({"shop00": Deal({}, {}, b"")}, 2)


def test_one_masked_vector_tells_nothing():
    """Zeros come out uniform, and a client's masked vectors of two aggregations are unrelated."""
    vectors = {name: np.zeros(20_000, np.uint32) for name in names_of(3)}
    first, second = Rounds(vectors).masked()["shop00"], Rounds(vectors).masked()["shop00"]
    counts = np.bincount(first >> 24, minlength=256)
    # Chi squared with 255 degrees of freedom: beyond 400 once in 10^8.
    assert (np.square(counts - 20_000 / 256) / (20_000 / 256)).sum() < 400
    assert abs(np.corrcoef(first.astype(float), second.astype(float))[0, 1]) < 0.05
    assert abs(np.corrcoef(first[:-1].astype(float), first[1:].astype(float))[0, 1]) < 0.05


def test_a_client_tells_one_kind_of_share_of_each_other_and_only_once():
    rounds = Rounds(vectors_of(6, 4))
    rounds.masked()
    mine = rounds.members["shop00"]
    survivors = frozenset(names_of(6)) - {"shop05"}
    told = mine.unmask(survivors)
    assert set(told.seeds) == survivors
    assert set(told.keys) == {"shop05"}
    with pytest.raises(OptionError, match="told its shares already; a second time could show one client's vector"):
        mine.unmask(frozenset(names_of(6)) - {"shop01"})


def test_steps_out_of_order_are_refused():
    member = Member("a", 2)
    with pytest.raises(OptionError, match="asked for a vector out of order"):
        member.masked(np.zeros(2, np.uint32), {})
    with pytest.raises(OptionError, match="has sent no vector"):
        member.unmask(frozenset("a"))
    with pytest.raises(OptionError, match="a is not among those that aggregate"):
        member.share({"b": Member("b", 2).advertise()})
    with pytest.raises(OptionError, match="1 clients for secure aggregation, and 2 must be left"):
        member.share({"a": member.advertise()})
    other = member.advertise()
    with pytest.raises(OptionError, match="two clients sent one key"):
        member.share({"a": other, "b": other})
    other = Member("b", 2)
    keys = {"a": member.advertise(), "b": other.advertise()}
    member.share(keys)
    with pytest.raises(OptionError, match="has shared its secrets already"):
        member.share(keys)
    with pytest.raises(OptionError, match="1 clients have shared their secrets, and 2 must be left"):
        member.masked(np.zeros(2, np.uint32), {})
    with pytest.raises(OptionError, match="got shares of c, which does not take part"):
        member.masked(np.zeros(2, np.uint32), {"c": (b"", b"")})


def test_survivors_must_be_those_that_shared():
    rounds = Rounds(vectors_of(3, 4))
    rounds.masked()
    with pytest.raises(OptionError, match="the survivors that shop00 was told are not those"):
        rounds.members["shop00"].unmask(frozenset({"shop00", "shop01", "stranger"}))


def test_shares_that_were_changed_on_their_way_are_refused():
    rounds = Rounds(vectors_of(3, 4))
    parts = dict(rounds.routed["shop00"])
    sealed, digests = parts["shop01"]
    parts["shop01"] = sealed[:-1] + bytes([sealed[-1] ^ 1]), digests
    with pytest.raises(RunError, match="sealed shares .shop01>shop00. were changed on their way"):
        rounds.members["shop00"].masked(np.zeros(4, np.uint32), parts)


def test_sealed_shares_of_another_length_are_refused():
    one, other = Member("a", 2), Member("b", 2)
    keys = {"a": one.advertise(), "b": other.advertise()}
    one.share(keys)
    other.share(keys)
    short = secure._seal(one._sealing("b"), b"short", "a>b")
    with pytest.raises(RunError, match="sealed shares .a>b. have 5 bytes, not 132"):
        other.masked(np.zeros(2, np.uint32), {"a": (short, b"")})


def test_shares_that_their_dealer_does_not_vouch_for_are_refused():
    rounds = Rounds(vectors_of(3, 4))
    sealed, digests = rounds.routed["shop00"]["shop01"]
    for odd in (bytes(64), digests[32:] + digests[:32], b""):
        parts = {**rounds.routed["shop00"], "shop01": (sealed, odd)}
        with pytest.raises(RunError, match="shop01 vouches for other shares than it dealt; .* without it"):
            copy.copy(rounds.members["shop00"]).masked(np.zeros(4, np.uint32), parts)


def test_every_false_share_is_known_for_one():
    rounds = Rounds(vectors_of(4, 4))
    sent = rounds.masked(gone=("shop02",))
    shares = {n: rounds.members[n].unmask(frozenset(sent)) for n in sent}
    assert all(are_dealt(n, told, rounds.deals) for n, told in shares.items())
    true = shares["shop00"]
    for name, part in true.seeds.items():
        changed = Shares({**true.seeds, name: part[:-1] + bytes([part[-1] ^ 1])}, true.keys)
        assert not are_dealt("shop00", changed, rounds.deals)
    assert not are_dealt("shop00", Shares(true.seeds, {"shop02": bytes(66)}), rounds.deals)
    # Another's share, or the same one as if it were of the other kind, is not the one that was dealt.
    assert not are_dealt("shop01", true, rounds.deals)
    assert not are_dealt("shop00", Shares({**true.seeds, "shop01": true.seeds["shop00"]}, true.keys), rounds.deals)


def test_who_deals_shares_of_another_seed_is_named():
    rounds = Rounds(vectors_of(3, 4))
    rounds.deals["shop01"] = replace(rounds.deals["shop01"], seed=bytes(32))
    with pytest.raises(RunError, match="the shares that shop01 dealt do not stand for its secrets; .* without it"):
        rounds.sum()


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    with pytest.raises(
        MissingExtra, match=r"secure aggregation needs an extra; in a clone of Netweight: pip install '\.\[federated\]'"
    ):
        exec(compile(Path(secure.__file__).read_text(encoding="utf-8"), "secure", "exec"), {"__name__": "again"})


def test_damaged_shares_and_keys_are_refused():
    vectors = vectors_of(3, 4)
    rounds = Rounds(vectors)
    sent = rounds.masked(gone=("shop02",))
    shares = {n: rounds.members[n].unmask(frozenset(sent)) for n in sent}
    wrong = {**shares, "shop00": Shares(dict.fromkeys(shares["shop00"].seeds, bytes([1] * 66)), shares["shop00"].keys)}
    with pytest.raises(RunError, match="shop00 told other shares than it was dealt; begin the round again without it"):
        unmasked(plain(sent), list(sent), wrong, rounds.keys, rounds.deals, 2)
    with pytest.raises(RunError, match="shop00 told shares of others than it was asked for"):
        unmasked(plain(sent), list(sent), {**shares, "shop00": Shares({}, {})}, rounds.keys, rounds.deals, 2)
    other = {**rounds.keys, "shop02": Member("shop02", 2).advertise()}
    with pytest.raises(RunError, match="the shares that shop02 dealt do not stand for its secrets"):
        unmasked(plain(sent), list(sent), shares, other, rounds.deals, 2)
    member = Member("a", 2)
    with pytest.raises(RunError, match="a public key that is none"):
        member.share({"a": member.advertise(), "b": Keys(bytes(32), bytes(31))})


@given(st.binary(min_size=32, max_size=32), st.integers(1, 8), st.data())
def test_any_threshold_of_shares_gives_the_secret_back(secret, threshold, data):
    count = data.draw(st.integers(threshold, 12))
    shares = split(secret, count, threshold)
    places = data.draw(st.permutations(range(count)))[:threshold]
    assert join({place + 1: shares[place] for place in places}, "a shop") == secret


def test_fewer_shares_say_nothing():
    secret = bytes(32)
    assert split(secret, 3, 2)[0] != split(secret, 3, 2)[0]
    with pytest.raises(RunError, match="the shares that a shop dealt do not stand for its secrets"):
        join({1: split(secret, 3, 2)[0]}, "a shop")


def test_the_mask_is_the_key_stream_of_aes_256():
    """NIST SP 800-38A has no vector that begins at counter 0; FIPS 197, C.3 is a block of zeros' kin: AES-256 of a zero
    block under a zero key is the known answer of the AES validation suite."""
    stream = bytes.fromhex("dc95c078a2408989ad48a21492842087")
    assert mask(bytes(32), 4).tobytes() == stream


@given(st.integers(1, 200), st.floats(1e-3, 1e3), st.integers(0, 2**32))
def test_fixed_point_sums_are_exact_to_half_a_step_for_each_client(clients, bound, seed):
    fixed = Fixed(bound, clients)
    values = np.random.default_rng(seed).uniform(-bound, bound, (clients, 20))
    values[:, 0] = bound
    values[:, 1] = -bound
    words = sum((fixed.encode(v) for v in values), np.zeros(20, np.uint32))
    apart = np.abs(fixed.decode(words) - values.sum(axis=0))
    assert apart.max() <= clients * fixed.step * 0.5000001


def test_what_fixed_point_cannot_hold_is_refused():
    with pytest.raises(OptionError, match="a value of 1.5, beyond the range of 1"):
        Fixed(1.0, 3).encode(np.array([0.0, -1.5]))
    with pytest.raises(OptionError, match="values that are not finite"):
        Fixed(1.0, 3).encode(np.array([np.nan]))
    with pytest.raises(OptionError, match="the range must be a number above 0"):
        Fixed(0.0, 3)
