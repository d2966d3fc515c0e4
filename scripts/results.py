"""Write docs/results.md and the README's table from benchmarks/results/*.json; with --check, say whether they are fresh."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import examples
import figures
import peers
import serving
from runs import section as runs_section

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results -->", "<!-- /results -->"
WORDS = {
    "en": (
        "BANKING77, official test",
        "accuracy",
        "certificate",
        "texts/s",
        "Netweight's speed / its",
        "p50, p99",
        "size",
    ),
    "zh": ("BANKING77 官方测试集", "准确率", "认证结论", "条/秒", "Netweight 相对其速度", "p50、p99", "大小"),
}
PLOT = "Quality against speed, filled where certified"
ELSEWHERE = "took turns with another artifact or on another machine: of its times only the ratio compares with others. "
CHINESE = {
    PLOT: "质量与速度，实心为已认证",
    ELSEWHERE: "与另一个模型产物、或在另一台机器上交替计时：只有速度比可与其他行相比。",
    "the teacher, PyTorch fp32": "教师模型，PyTorch fp32",
    "the teacher, ONNX Runtime dynamic int8": "教师模型，ONNX Runtime 动态 int8",
    "the teacher, OpenVINO + NNCF int8": "教师模型，OpenVINO + NNCF int8",
    "the teacher, NNCF with accuracy control": "教师模型，NNCF 精度控制",
    "the teacher, Torch-Pruning, fine-tuned, int8": "教师模型，Torch-Pruning 剪枝后微调，int8",
    "the teacher, Olive's search": "教师模型，Olive 搜索",
    "model2vec classifier": "model2vec 分类器",
    "TF-IDF + logistic regression": "TF-IDF + 逻辑回归",
    "certified": "已认证",
    "not certified": "未认证",
    "worse": "更差",
}

Run = dict[str, Any]


def runs(name: str) -> list[Run]:
    """Stored runs of one table, by seed."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob(f"{name}-seed*.json"))]


def headline(language: str) -> str:
    """The README's table: BANKING77 beside its peers, the median seed by speed against the best certified one
    (of an even number the slower one)."""
    found = sorted(
        (shop for shop in figures.shops(peers.cells()) if shop[0].startswith("banking77 ")), key=figures.speed
    )
    _, own, _ = found[(len(found) - 1) // 2]
    seed, words = own["seed"], WORDS[language]
    lines = [f"| {' | '.join(words)} |", "|---" * len(words) + "|"]
    cells = {peer: peers.cells().get(("banking77", seed, peer)) for peer in peers.names_in("PEERS")}
    sign = ""
    for peer, cell in cells.items():
        if cell is None or "timing" not in cell:
            continue
        c, t = cell["certificate"], cell["timing"][peer]
        own_row = peer == "netweight"
        title = f"**Netweight** ({' > '.join(own['made']['tiers'])})" if own_row else said(peers.TITLES[peer], language)
        if peers.apart(cell, own):
            title, sign = f"{title} {peers.APART}", f"{peers.APART} {said(ELSEWHERE, language)}"
        times = "" if own_row else f"{t['ratio']:.3g}x"
        lines.append(
            f"| {title} | {100 * c['quality']['value']:.2f} % | {said(c['verdict'], language)} | {t['rows_per_second']:,.0f} | "
            f"{times} | {t['p50']:.2f}, {t['p99']:.2f} ms | {cell['made']['bytes'] / 1e6:.1f} MB |"
        )
    c, m = own["certificate"], own["machine"]
    where = f"{m['cpu']}, {m['threads']} threads, {m['date']}, Netweight's row of commit {m['commit']}"
    drop, sure = f"{100 * c['drop']['high']:.2f}", f"{100 * (1 - c['level']):g} %"
    # One seed alone would not say what the others were against.
    against = ((*figures.fastest(shop), shop[1]["seed"]) for shop in found)
    each = [f"{ratio:.1f}x ({said(peers.TITLES[p], language)}, seed {s})" for ratio, p, s in against if p]
    plot = f"![{said(PLOT, language)}](docs/{peers.plot('banking77', seed)})"
    command, page = f"`make bench SET=banking77 SEED={seed}`", "[docs/results.md](docs/results.md)"
    if language == "zh":
        return "\n".join(
            [
                *lines,
                "",
                f"认证：在任何搜索都没有见过的 {c['rows']:,} 条数据上与教师模型配对比较，在 {sure} 置信水平下最多下降 {drop} 个百分点，允许 "
                f"{c['margin']:g} 个百分点。{len(found)} 个种子中按速度取中间的一个（seed {seed}）；与每个种子下最快的、已认证的 Transformer 对手相比：{'，'.join(each)}。每个速度比都来自与该对手交替进行的计时轮次，与表中两个“条/秒”之商略有不同。"
                f"{m['cpu']}，{m['threads']} 线程，{m['date']}，Netweight 一行来自 commit {m['commit']}。{sign}命令：{command}；全部数字与说明见 {page}。",
                "",
                plot,
            ]
        )
    return "\n".join(
        [
            *lines,
            "",
            f"The certificate: against the teacher on {c['rows']:,} rows that no search saw, with {sure} confidence at most "
            f"{drop} points are lost; {c['margin']:g} was allowed. Of {len(found)} seeds the median one by speed "
            f"(seed {seed}); beside the fastest certified transformer peer of each: {', '.join(each)}. Each ratio of speeds is from rounds that take turns with that peer, and so not quite that of two "
            f"numbers of the table. {where}. {sign}Command: {command}; all figures and how each came about: {page}.",
            "",
            plot,
        ]
    )


def said(words: str, language: str) -> str:
    """In that language, where it differs."""
    return CHINESE.get(words, words) if language == "zh" else words


def page() -> tuple[str, dict[str, str]]:
    """docs/results.md, and the plots that it shows by file name."""
    machines: dict[str, list[str]] = {}
    for name, own, _ in figures.shops(peers.cells()):
        m = own["machine"]
        of = machines.setdefault(f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads", [])
        of.extend([name.split()[0]] if name.split()[0] not in of else [])
    where = "; ".join(f"{machine} ({', '.join(of)})" for machine, of in machines.items())
    parts = [
        "# Results\n\nWritten by `make docs`, and by `make bench` after its cells, from `benchmarks/results/`: tables from what commands stored, and beneath them notes, whose "
        "numbers were read off the commands that they name.\n",
        f"Machines: {where}. Shared and noisy: trust ratios, which come from interleaved rounds of one run on one machine.\n",
    ]
    beside, plots = peers.tables()
    growth, more = peers.scaling()
    together, others = runs_section()
    parts += [
        figures.table(),
        *beside,
        *_notes("notes.md"),
        peers.roofline(),
        *growth,
        serving.section(),
        together,
        profile(runs("banking77-standard")[0]),
        *_notes("profile.md"),
        bought(runs("banking77-standard")[0]),
    ]
    return "\n".join(parts).rstrip() + "\n", plots | more | others


def _notes(name: str) -> list[str]:
    """Sentences that people wrote; none where there are none."""
    path = RESULTS / name
    return [path.read_text(encoding="utf-8")] if path.exists() else []


def profile(run: Run) -> str:
    """Where a cascade's time goes, from the job's own costs."""
    tiers, costs, m = run["inspect"]["tiers"], run["costs"], run["bench"]["machine"]
    lines = [
        "## Where the time goes\n",
        f"BANKING77, seed {run['seed']}, the artifact of `--effort standard` ({peers.where(m)}): "
        "microseconds of a row in batches, as the job measured its tiers.\n",
    ]
    lines += ["| part | alone | share of rows | together | size |", "|---|---|---|---|---|"]
    parts = [("tokenization", costs[""][0], 1.0, "")]
    reached = 1.0
    for tier in tiers:
        size = f"{tier['bytes'] / 1e6:.1f} MB"
        parts.append((tier["name"], costs[f"{tier['name']} {tier['engine']}"][0], reached, size))
        reached -= tier["answered"]
    lines += [
        f"| {n} | {1e6 * c:.1f} | {100 * share:.0f} % | {1e6 * c * share:.1f} | {size} |" for n, c, share, size in parts
    ]
    return "\n".join(lines) + "\n"


def bought(run: Run) -> str:
    """What each step gave and what was not taken, by `netweight explain`."""
    found = run["explain"]
    lines = [
        "## What each step bought\n",
        f"`netweight explain` of that artifact: {found['rows']:,} dev rows, all timed in turns on {found['threads']} threads. "
        "Each tier starts from the teacher again, and shows its files as they would ship.\n",
        f"| tier | step | {found['metric']} | size | ms a row |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {s['tier']} | {s['done']} | {100 * s['quality']:.2f} | {s['bytes'] / 1e6:.1f} MB | {s['milliseconds']:.3f} |"
        for s in found["steps"]
    ]
    others = [
        *(f"- Candidate {c['name']} {c['why']}." for c in found["candidates"]),
        *(
            f"- {t['name']} ({100 * t['quality']:.2f}, {t['bytes'] / 1e6:.1f} MB{_took(t)}{_asked(t)}): {t['why']}."
            for t in found["tried"]
        ),
        *(f"- {r['name']} was not made: {r['why']}." for r in found["left_out"]),
    ]
    timed = f" (–: not timed; the others' times are {found['timed']})" if "timed" in found else ""
    return "\n".join([*lines, "", f"Tried and not taken{timed}:", "", *others]) + "\n"


def _took(tried: Run) -> str:
    """Microseconds, where what was stored says them, and a dash where it says that there are none."""
    if "microseconds" not in tried:
        return ""
    return ", – us" if tried["microseconds"] is None else f", {tried['microseconds']:,.1f} us"


def _asked(tried: Run) -> str:
    """What a trial tried, where what was stored says it."""
    params = tried.get("params") or {}
    return "".join(f"; {k} {v:g}" if isinstance(v, float) else f"; {k} {v}" for k, v in params.items())


def main() -> int:
    """Write, or compare."""
    text, plots = page()
    wanted = {ROOT / "docs" / "results.md": text} | {ROOT / "docs" / name: plot for name, plot in plots.items()}
    wanted |= examples.pages()
    for name, language in (("README.md", "en"), ("README.zh-CN.md", "zh")):
        text = (ROOT / name).read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        wanted[ROOT / name] = f"{before}{BEGIN}\n{headline(language)}\n{END}{rest.partition(END)[2]}"
    stale = [p for p, text in wanted.items() if not p.exists() or p.read_text(encoding="utf-8") != text]
    if "--check" not in sys.argv[1:]:
        for path in stale:
            path.write_text(wanted[path], encoding="utf-8")
        return 0
    for path in stale:
        print(f"{path.name} is not what benchmarks/results says; run `make docs` and commit it", file=sys.stderr)
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main())
