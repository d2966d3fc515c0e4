"""The main job of a server whose training rows are with its clients: from their updates to a certified artifact."""

from __future__ import annotations

from dataclasses import replace

from netweight.errors import OptionError
from netweight.federate.options import Terms
from netweight.federate.start import REPORTS, Deployment, Place, opened
from netweight.job import Job
from netweight.pipeline import run
from netweight.reporter import Reporter
from netweight.run.federated.report import in_words, read_reports
from netweight.ship import Result
from netweight.store import store_of


def optimize(place: Place, job: Job, terms: Terms, reporter: Reporter) -> Result:
    """The main call over the clients that connect: `out` becomes an artifact, with its store `out`.run beside it, in
    which the reports are (federation.json).

    The job has no training rows of its own. With a pool, clients train the teacher, and students are made here, on the
    pool; without one, clients make them too, which privacy forbids. Started again with the same `out` it goes on.
    Raises OptionError under privacy without a pool, and what the main call and the run raise; clients are told.
    """
    if terms.privacy is not None and job.tables.pool is None:
        raise OptionError(
            "under privacy clients train the teacher alone: each further fit on their rows would cost as much again, "
            "and int8 needs exact sums over them. Give --pool, texts of the server's own without labels, on which "
            "students learn from the teacher at no cost; or --privacy off."
        )
    if not job.options.finetune.probe:
        reporter.note("the head's probe is left out: it is an exact sum over rows, which no noise hides")
    with opened(place, reporter.note) as channel:
        job = replace(job, run=str(terms))
        result = run(
            job, place.out, reporter, lambda data, folder: Deployment(channel, data, folder, terms, reporter.note)
        )
    reports = read_reports(store_of(place.out) / REPORTS)
    for line in [line for report in reports for line in report.lines()]:
        reporter.note(line)
    reporter.note(in_words(reports))
    return result
