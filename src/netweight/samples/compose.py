"""One message: an intent, a second one beside it, a frame, and the manners of its channel."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from netweight.samples.frames import CLOSINGS, COLOURS, DETAILS, FORMS, GREETINGS, GROUPS, OPENINGS, SIZES, WORDS
from netweight.samples.goods import GOODS
from netweight.samples.grammar import Phrases, Slots, expand, pick
from netweight.samples.orders import ORDERS
from netweight.samples.services import SERVICES

INTENTS: dict[str, Phrases] = ORDERS | GOODS | SERVICES
NOISE = 0.025

# Repeats are weights: shops hear more about parcels and refunds than about sizes.
_DRAWN = (
    *INTENTS,
    *INTENTS,
    *ORDERS,
    "track_parcel",
    "late_delivery",
    "return_item",
    "refund_status",
    "payment_failed",
)
_CHANNELS = ("chat", "chat", "chat", "mail", "mail", "app", "app")
_FORMS = (
    *("plain",) * 18,
    *("aside",) * 6,
    *("contrast",) * 3,
    *("negation",) * 3,
    *("history",) * 2,
    "correction",
)
_TYPOS = {"chat": 0.35, "app": 0.2, "mail": 0.06}
_CONTRACTED = (
    ("i am ", "i'm "),
    ("it is ", "it's "),
    ("that is ", "that's "),
    ("do not ", "don't "),
    ("does not ", "doesn't "),
    ("did not ", "didn't "),
    ("is not ", "isn't "),
    ("was not ", "wasn't "),
    ("could not ", "couldn't "),
    ("i would ", "i'd "),
    ("i have been ", "i've been "),
    ("cannot ", "can't "),
    ("what is ", "what's "),
    ("where is ", "where's "),
)
_CHATTED = (
    ("please", "pls"),
    (" you ", " u "),
    (" because ", " cos "),
    ("i want to ", "i wanna "),
    (" and ", " n "),
    (" about ", " abt "),
    ("thanks", "thx"),
)
_BEFORE_VOWEL = re.compile(r"\ba(?= (?:[aeio]|un|um))")
_SENTENCE = re.compile(r"(?:^|(?<=[.?!] ))[a-z]")
_I = re.compile(r"\bi\b")
_BEFORE_MARK = re.compile(r" +([,.?!:])")
_DOUBLED = re.compile(r"([.?!])[.?!,]+")


@dataclass(frozen=True)
class Message:
    """A text, what it asks for, and the label it carries: another intent in about 2.5 % of messages."""

    text: str
    intent: str
    label: str
    channel: str
    form: str


def messages(rng: Random) -> Iterator[Message]:
    """Messages without end, repeats possible."""
    names = tuple(INTENTS)
    while True:
        intent = pick(rng, _DRAWN)
        other = pick(rng, INTENTS[intent].near if rng.random() < 0.6 else names)
        while other == intent:
            other = pick(rng, names)
        form, channel = pick(rng, _FORMS), pick(rng, _CHANNELS)
        slots = _slots(intent, other, rng)
        text = _styled(_dressed(pick(rng, FORMS[form]), channel, slots, rng), channel, rng)
        label = intent
        if rng.random() < NOISE:
            # People who label in a hurry mostly slip to the topic that is mentioned beside.
            label = other if rng.random() < 0.5 else pick(rng, [name for name in names if name != intent])
        yield Message(text, intent, label, channel, form)


def _slots(intent: str, other: str, rng: Random) -> Slots:
    """What the slots of one message hold; its item, part, colours and sizes stay the same throughout."""
    sized = "size_advice" in (intent, other)
    group = GROUPS["wear" if sized else pick(rng, tuple(GROUPS))]
    main, second = INTENTS[intent], INTENTS[other]
    item, another = _two(group["item"], rng)
    colour1, colour2 = _two(COLOURS, rng)
    size1, size2 = _two(SIZES, rng)
    return {
        **WORDS,
        "item": (item,),
        "another": (another,),
        "part": (pick(rng, group["part"]),),
        "dmg": (pick(rng, group["dmg"]),),
        "prop": group["prop"],
        "colour1": (colour1,),
        "colour2": (colour2,),
        "size1": (f"size {size1}",),
        "size2": (f"size {size2}",),
        "number": (f"{100_000 + int(rng.random() * 900_000)}",),
        "say": main.says,
        "ask": main.asks,
        "want": main.wants,
        "topic": main.topics,
        "say2": second.says,
        "want2": second.wants,
        "topic2": second.topics,
        "fine2": second.fine,
    }


def _two(options: Sequence[str], rng: Random) -> tuple[str, str]:
    """Two different options."""
    at = int(rng.random() * len(options))
    return options[at], options[(at + 1 + int(rng.random() * (len(options) - 1))) % len(options)]


def _dressed(frame: str, channel: str, slots: Slots, rng: Random) -> str:
    """The filled frame between greeting, details and closing, in lower case."""
    parts = [frame]
    chance = rng.random()
    if chance < 0.15:
        parts.insert(0, pick(rng, OPENINGS))
    elif chance < 0.35:
        parts.append(pick(rng, DETAILS))
    if rng.random() < {"mail": 0.7, "chat": 0.4, "app": 0.2}[channel]:
        parts.insert(0, pick(rng, GREETINGS[channel]))
    if rng.random() < {"mail": 0.6, "chat": 0.3, "app": 0.25}[channel]:
        parts.append(pick(rng, CLOSINGS[channel]))
    text = " ".join(expand(" ".join(parts), slots, rng).split())
    text = _DOUBLED.sub(r"\1", _BEFORE_MARK.sub(r"\1", text))
    return _BEFORE_VOWEL.sub("an", text)


def _styled(text: str, channel: str, rng: Random) -> str:
    """Contractions, capitals, chat spelling and typos as they are usual in the channel."""
    if rng.random() < {"mail": 0.3, "chat": 0.9, "app": 0.7}[channel]:
        for long, short in _CONTRACTED:
            text = text.replace(long, short)
    if channel == "chat":
        for long, short in _CHATTED:
            if rng.random() < 0.2:
                text = text.replace(long, short)
        if rng.random() < 0.3:
            text = text.replace("'", "")
    if rng.random() < _TYPOS[channel]:
        for _ in range(1 + int(rng.random() * 3)):
            text = _mistyped(text, rng)
    if channel == "mail" or rng.random() < (0.3 if channel == "chat" else 0.8):
        text = _I.sub("I", _SENTENCE.sub(lambda found: found.group().upper(), text))
    if channel != "mail" and rng.random() < 0.5:
        text = text.rstrip(".?")
    return text


def _mistyped(text: str, rng: Random) -> str:
    """The text with two letters swapped, one lost or one doubled, inside of a word of four letters or more."""
    words = text.split(" ")
    at = int(rng.random() * len(words))
    word = words[at]
    if len(word) < 4 or not word.isalpha():
        return text
    i = 1 + int(rng.random() * (len(word) - 2))
    kind = rng.random()
    if kind < 0.4:
        word = word[:i] + word[i + 1] + word[i] + word[i + 2 :]
    else:
        word = word[:i] + (word[i + 1 :] if kind < 0.7 else word[i] + word[i:])
    words[at] = word
    return " ".join(words)
