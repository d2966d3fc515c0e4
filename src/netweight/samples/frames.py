"""Sentence frames, words and small talk that all intents share. Written for this project, synthetic.

In a frame `{say}`, `{ask}`, `{want}` and `{topic}` express the intent of the message; with a 2 (`{say2}`, `{fine2}`)
they mention another intent. Most frames offer the same phrases to both, so that only the sentence tells which is which.
"""

from __future__ import annotations

from netweight.samples.grammar import Slots

FORMS: Slots = {
    "plain": (
        "{ask}",
        "{ask}",
        "{say}. {ask}",
        "{say}. [can you help|what now|what can be done|any advice]?",
        "{say}[, please help|, please look into it|, and i hope you can help|].",
        "i [want|would like|need] to {want}[, please|].",
        "[can|could] you help me [to |]{want}?",
        "i [have a question|am writing|have to ask you] about {topic}. [{ask}|]",
        "{topic}[: what can you do|: who can help me with that]?",
        "i am [trying|hoping] to {want}. [what do i need to do|how does that work]?",
    ),
    "aside": (
        "{fine2}[, thanks for that|, by the way|]. {ask}",
        "{ask} [by the way, |apart from that |]{fine2}.",
        "{say}. [otherwise|by the way|apart from that], {fine2}.",
        "{say}. {fine2}, so that is not [it|my problem].",
        "i [want|would like] to {want}. [perhaps|maybe] i will {want2} [another day|some other time], not now.",
        "{ask} my {who} also wants to {want2} and will [write to you|ask you about it] separately.",
        "my {who} asked you how to {want2}. that is [settled|done]. {ask}",
        "{say}. [i read|i saw] your help page on {topic2}, it has nothing on this.",
        "while i waited in the line for {topic2} i thought i would ask here: {ask}",
    ),
    "contrast": (
        "{fine2}, but {say}.",
        "{say}, [although|even though] {fine2}.",
        "{fine2}[, no complaints there|]. [however|still|only], {say}.",
        "[you may think|it looks like] i have to {want2}, but [actually|in fact] i [just|only|] want to {want}.",
        "i [just|only|] want to {want}, even if [you may think|it looks like] i have to {want2}.",
        "[rather than|instead of being told how to] {want2}, i would [like|prefer] to {want}.",
        "i would [rather|sooner] {want} than {want2}.",
        "i would [like|prefer] to {want} rather than {want2}.",
        "[everyone|your colleague] keeps talking about {topic2} [but|while] [i only care|my concern is] about {topic}.",
        "{topic2} can wait, {topic} [cannot|is urgent].",
        "{topic} [cannot wait|is urgent], {topic2} [can wait|is not].",
        "unlike my {who}, who needed help with {topic2}, i [have a question about|need help with] {topic}.",
        "i [have a question about|need help with] {topic}, unlike my {who}, who [asked|wrote] about {topic2}.",
        "let us [leave|put] {topic2} aside, [what matters to me|what i care about] is {topic}.",
        "what matters to me is {topic}, so let us [leave|put] {topic2} aside.",
    ),
    "negation": (
        "[this|it] is not about {topic2}, [this|it] is about {topic}.",
        "[this|it] is about {topic}[, not about| and not about|, it is not about] {topic2}.",
        "i do not [want|need] to {want2}, i [want|need] to {want}.",
        "i [want|need] to {want}, i do not [want|need] to {want2}.",
        "i am not asking for help with {topic2}, [i am asking for help with|my question is about] {topic}.",
        "i am asking for help with {topic}, [not with|i am not asking about] {topic2}.",
        "my [question|problem|request] is {topic}, not {topic2}.",
        "my [question|problem|request] is not {topic2} but {topic}.",
        "it is not that {say2}, it is that {say}.",
        "the trouble is that {say}, not that {say2}.",
        "please do not send me the [standard text|usual answer|help page] on {topic2}, i asked about {topic}.",
        "i asked about {topic}, please do not send me the [standard text|usual answer|help page] on {topic2}.",
        "nobody said that {say2}. [what i said|my point] is that {say}.",
        "i said that {say}. [i never said|nobody said] that {say2}.",
        "{topic} is [why i am writing|what i am asking about|my concern], {topic2} is not.",
        "{topic2} is not [why i am writing|what i am asking about|my concern], {topic} is.",
    ),
    "history": (
        "last [month|year|time|spring] i wrote because {say2}. [this time|now|today] {say}.",
        "[this time|now|today] i write because {say}. last [month|year|time] it was that {say2}.",
        "{ago} i asked you about {topic2} and you [solved|settled] that. [today|now] it is about {topic}.",
        "[today|now] i am asking about {topic}. {ago} it was {topic2}, and you [solved|settled] that.",
        "my [old|previous|last] ticket was about {topic2}, [this|the new] one is about {topic}.",
        "[this|the new] ticket is about {topic}, the [old|previous] one about {topic2} can be closed.",
        "you [already|kindly] helped me with {topic2}, thanks. now i need help with {topic}.",
        "i need help with {topic} now, you [already|kindly] helped me with {topic2}.",
        "you helped me to {want2} {ago}, [today|now] i [need|want] to {want}.",
        "[today|now] i [need|want] to {want}, after you helped me to {want2} {ago}.",
        "[at first|yesterday] i wanted to {want2}, [now|today] i want to {want}.",
        "[now|today] i want to {want}, [at first|yesterday] i wanted to {want2}.",
    ),
    "correction": (
        "[your chatbot|the menu|the hotline] sent me to {topic2}, but i was asking about {topic}.",
        "i was asking about {topic}, but [your chatbot|the menu|the hotline] sent me to {topic2}.",
        "i [clicked on|picked] {topic2} by mistake, [the right topic is|i meant] {topic}.",
        "i meant {topic}, i [clicked on|picked] {topic2} by mistake.",
        "sorry, [wrong form|ignore my last message]. it said {topic2}, it should be {topic}.",
        "please [change|move] [the subject of my ticket|my ticket] from {topic2} to {topic}.",
        "please [change|move] [the subject of my ticket|my ticket] to {topic}, it is under {topic2} now.",
        "your colleague [noted|understood] that {say2}, [what happened is|the truth is] that {say}.",
        "[what happened is|the truth is] that {say}, your colleague [noted|understood] that {say2}.",
        "your [reply|answer] explained how to {want2}, [my question was|i asked] how to {want}.",
        "i asked how to {want} and your [reply|answer] explained how to {want2}.",
        "i asked about {topic} and you answered on {topic2}.",
        "you answered on {topic2} and i had asked about {topic}.",
    ),
}

WORDS: Slots = {
    "it": ("{one}", "{one}", "{one}", "the {item} [i ordered|from my last order|from your shop]"),
    # Where a relative clause follows.
    "one": ("the [new |]{item}", "my [new |]{item}", "this {item}", "the {colour1} {item}"),
    "a": ("a {item}", "a {colour2} {item}"),
    "other": ("a {another}", "a {colour1} {another}"),
    "parcel": ("parcel", "package", "delivery", "shipment", "box"),
    "order": ("order", "purchase"),
    "carrier": ("courier", "driver", "carrier", "postman"),
    "by": ("by [monday|tuesday|wednesday|thursday|friday|saturday]", "last week", "[two|three|five] days ago"),
    "ago": ("[two|three] days ago", "last [week|month|friday]", "a [week|month] ago", "on [monday|tuesday|sunday]"),
    "months": ("[two|three|four|five|six|eight|ten] months", "half a year", "a year", "one winter", "some months"),
    "place": ("my [office|work]", "[a|my] neighbour", "my parents", "a pick-up point", "my [new|other] flat"),
    "who": ("sister", "friend", "mother", "neighbour", "colleague", "flatmate"),
    "pay": ("card", "debit card", "credit card", "bank account"),
    "code": ("voucher", "promo code", "discount code", "coupon", "gift code"),
    "bill": ("invoice", "receipt", "bill"),
}

COLOURS = ("black", "white", "grey", "navy", "green", "red", "beige", "olive", "brown", "yellow", "pink", "blue")
SIZES = ("s", "m", "l", "xl", "36", "38", "40", "42", "44")

GROUPS: dict[str, Slots] = {
    "wear": {
        "item": (
            *("jacket", "coat", "dress", "jumper", "shirt", "blouse", "skirt", "hoodie", "cardigan", "raincoat"),
            *("pair of boots", "pair of jeans", "pair of sandals", "pair of trainers", "ski suit", "blazer"),
        ),
        "part": ("zip", "seam", "lining", "button", "stitching", "fabric", "label"),
        "dmg": ("torn", "ripped", "stained", "frayed", "full of holes", "faded"),
        "prop": ("waterproof", "machine washable", "lined", "stretchy", "vegan", "warm enough for winter", "itchy"),
    },
    "home": {
        "item": (
            *("lamp", "vase", "kettle", "teapot", "mirror", "chair", "side table", "shelf", "frying pan", "clock"),
            *("coffee grinder", "picture frame", "laundry basket", "toaster", "bread bin", "garden bench"),
        ),
        "part": ("lid", "handle", "base", "hinge", "leg", "coating", "rim"),
        "dmg": ("cracked", "chipped", "dented", "bent", "scratched", "in pieces", "loose"),
        "prop": ("dishwasher safe", "rustproof", "foldable", "suitable for outdoors", "heat resistant", "solid wood"),
    },
    "tech": {
        "item": (
            *("headset", "keyboard", "charger", "speaker", "tablet", "smart watch", "radio", "camera", "power bank"),
            *("e-reader", "printer", "desk fan", "air purifier", "hair dryer", "alarm clock", "monitor"),
        ),
        "part": ("battery", "cable", "screen", "charging port", "switch", "cover", "plug"),
        "dmg": ("cracked", "scratched", "dead", "loose", "bent", "dented", "broken"),
        "prop": ("splash proof", "compatible with my phone", "rechargeable", "quiet", "dimmable", "wireless"),
    },
}

GREETINGS: Slots = {
    "mail": ("[hello|good morning|good afternoon|dear team|dear customer service|dear sir or madam|hi all],",),
    "chat": ("[hi|hey|hello|hey there|hiya|morning|ok so|sorry to bother you|quick one]", "hi [there|team],"),
    "app": ("[hello|hi|good evening],",),
}
OPENINGS = (
    "[i am writing about|it concerns|regarding] order {number}.",
    "i have been [a customer|shopping with you] for [years|a long time].",
    "[i am writing from my phone|i tried the hotline before|the hotline was busy].",
    "i [read|looked through] the help page [twice|already|] and found nothing.",
)
DETAILS = (
    "[order number|my order is|it concerns order|order] {number}.",
    "i [ordered|bought] it {ago}.",
    "it is a [present|gift] for my {who}.",
    "i also [like|love] the new {another}, by the way.",
    "[you can call me after work|i am at home most evenings|i am in no hurry|i need an answer today].",
)
CLOSINGS: Slots = {
    "mail": (
        "[kind|best|warm] regards.",
        "[many thanks|thank you] [in advance|for your help].",
        "i look forward to your reply.",
    ),
    "chat": ("[thanks|thank you|cheers|ty]", "[thanks|please reply|let me know]!", "[anyone there|hello]?"),
    "app": ("[thanks|thank you|please reply soon].", "[i hope you can help|waiting for your answer]."),
}
