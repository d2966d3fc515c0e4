"""The verdict in plain words: what was shown, on how many rows, and what is missing."""

from __future__ import annotations

from netweight.certify.certificate import Certificate, Outcomes, Tested
from netweight.report.format import Scale, count, level, percent
from netweight.report.html import Html, code, definitions, element, figure, join, section
from netweight.report.intervals import intervals

_KIND = {"certified": "certified", "not certified": "uncertified", "worse": "worse"}
_BEYOND = "no number of rows up to ten million"
_SIGN = {"certified": "✓", "not certified": "?", "worse": "✗"}


def confidence(certificate: Certificate) -> str:
    """Registered confidence over all looks: "97.5 %"."""
    return level(certificate.registration.confidence)


def headline(certificate: Certificate) -> Html:
    """The page's first heading."""
    shipped, reference = certificate.shipped.name, certificate.registration.reference.name
    words = {
        "certified": f"Certified: {shipped} may replace {reference}",
        "not certified": f"Not certified: not shown that {shipped} is as good as {reference}",
        "worse": f"Worse: {shipped} loses more quality than is allowed",
    }[certificate.verdict]
    return element("h1", words)


def exact(certificate: Certificate, outcomes: Outcomes) -> bool:
    """Whether the test is false in at most its level; else it is a bootstrap, and about that often."""
    return certificate.registration.task.paired_binary and outcomes.groups is None


def sentence(certificate: Certificate, outcomes: Outcomes, scale: Scale) -> str:
    """What was shown."""
    final, rows = certificate.final, count(certificate.registration.rows)
    fact = f"{scale.name} {scale.falls} by less than {scale.allowed(final.margin)}"
    sure = f"with {'' if exact(certificate, outcomes) else 'about '}{confidence(certificate)} confidence"
    if certificate.verdict == "certified":
        return f"{_capital(fact)} {sure} on {rows} rows that no search saw."
    if certificate.verdict == "worse":
        more = f"{scale.name} {scale.falls} by more than the allowed {scale.allowed(final.margin)}"
        return f"{_capital(more)}: {rows} rows that no search saw show it {sure}."
    return f"It is not shown {sure} that {fact}, on {rows} rows that no search saw."


def verdict_section(certificate: Certificate, outcomes: Outcomes, scale: Scale) -> Html:
    """The first section: sentence, interval, both scores, power, rows needed."""
    final = certificate.final
    kind = _KIND[certificate.verdict]
    badge = element("span", f"{_SIGN[certificate.verdict]} {certificate.verdict}", kind=f"badge {kind}")
    return section(
        "verdict",
        "What was shown",
        element("p", badge),
        element("p", sentence(certificate, outcomes, scale), kind="lead"),
        join(element("p", words) for words in _consequences(certificate, scale)),
        figure(
            intervals("drop-plot", [final], scale),
            f"Observed drop of {final.candidate.name} with its interval: {scale.drop(final.drop)}. It passes where the "
            f"whole interval lies left of the margin of {scale.allowed(final.margin)}. {_capital(scale.explained)}.",
        ),
        _facts(certificate, outcomes, scale),
        element(
            "p",
            "From the certify rows; ",
            code("netweight verify DIR"),
            " recomputes every number of this section from the outcomes of single rows in the artifact's folder DIR.",
            kind="from",
        ),
    )


def _consequences(certificate: Certificate, scale: Scale) -> list[str]:
    final = certificate.final
    allowed = scale.allowed(final.margin)
    if certificate.verdict == "certified":
        return []
    if certificate.verdict == "worse":
        return [f"The whole interval lies beyond the margin of {allowed}. Use the reference, or allow a larger drop."]
    found = [
        f"That does not say that it is worse: drops on both sides of {allowed} fit what was seen."
        if final.drop.low <= final.margin
        else f"What was seen lies beyond {allowed}."
    ]
    none, observed = certificate.rows_needed
    found.append(
        "Rows needed for a chance of 80 % to pass: "
        f"{count(none, _BEYOND)} if the true drop were 0; "
        f"{count(observed, _BEYOND)} if it were the observed {scale.points(final.drop.value)}."
    )
    return found


def _facts(certificate: Certificate, outcomes: Outcomes, scale: Scale) -> Html:
    final, registration = certificate.final, certificate.registration
    sure = exact(certificate, outcomes)
    missed = (
        f"each bound is missed with a chance of at most {level(registration.level)}"
        if sure
        else f"each bound is missed with a chance of about {level(registration.level)}: it is a bootstrap's, whose "
        "errors were simulated and are not bounded"
    )
    facts = [
        (f"Reference ({registration.reference.name})", scale.estimate(certificate.reference)),
        (f"Shipped ({final.candidate.name})", scale.estimate(final.quality)),
        ("Observed drop in quality", scale.drop(final.drop)),
        ("Allowed drop in quality", f"less than {scale.allowed(final.margin)}, fixed before the labels were opened"),
        ("Rows that differ", _changed(final, scale, registration.rows)),
        ("Power", f"{percent(certificate.power)}: the chance to pass with this many rows if the true drop were 0"),
        (
            "Looks at these rows",
            f"{count(registration.look)}; this one was tested at a level of {level(registration.level)}, so "
            f"that {'' if sure else 'about '}{confidence(certificate)} holds over all looks together",
        ),
        ("Intervals", missed),
    ]
    if certificate.verdict == "certified" and certificate.rows_needed[0] is not None:
        needed = f"{count(certificate.rows_needed[0])} for a chance of 80 % to pass, if the true drop were 0"
        facts.insert(6, ("Rows needed", needed))
    return definitions(facts)


def _changed(final: Tested, scale: Scale, rows: int) -> str:
    lost, gained = count(final.lost), count(final.gained)
    if scale.task.kind == "score":
        return f"shipped is further from the truth on {lost}, nearer to it on {gained}, of {count(rows)}"
    return f"only the reference is right on {lost}, only the shipped model on {gained}, of {count(rows)}"


def _capital(words: str) -> str:
    return words[0].upper() + words[1:]
