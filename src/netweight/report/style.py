"""The page's style sheet. Every pair of colours that carries text has a contrast of at least 4.5 in both schemes."""

LIGHT = {
    "page": "#ffffff", "panel": "#f4f6f8", "text": "#1a1f24", "muted": "#55606b", "rule": "#d3d9df",
    "edge": "#7a8691", "accent": "#0a5bb5", "good": "#146c2e", "bad": "#b3261e", "warn": "#855300",
    "t0": "#0a5bb5", "t1": "#855300", "t2": "#6a3fa0", "t3": "#146c2e", "tint": "#ffffff",
}  # fmt: skip
DARK = {
    "page": "#11161b", "panel": "#1a2128", "text": "#e6eaee", "muted": "#a3aeb9", "rule": "#38434d",
    "edge": "#8996a2", "accent": "#74b5ff", "good": "#62d084", "bad": "#ff8f80", "warn": "#e8b755",
    "t0": "#74b5ff", "t1": "#e8b755", "t2": "#c3a1f5", "t3": "#62d084", "tint": "#11161b",
}  # fmt: skip


def _variables(colours: dict[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in colours.items())


_HEATS = "".join(f".heat{level}{{fill-opacity:{0.28 + 0.12 * level:.2f}}}" for level in range(1, 7))
_TIERS = "".join(f".t{k}{{--c:var(--t{k})}}" for k in range(4))

CSS = f"""
:root{{color-scheme:light dark;{_variables(LIGHT)}}}
@media (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--page);color:var(--text);
 font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Noto Sans CJK SC",sans-serif}}
header,main,footer{{max-width:1080px;margin:0 auto;padding:0 1rem}}
header{{padding-top:1.5rem}}
h1{{font-size:clamp(1.5rem,5vw,2.4rem);line-height:1.2;margin:.2rem 0 .8rem;overflow-wrap:anywhere}}
h2{{font-size:1.35rem;line-height:1.3;margin:0 0 .6rem}}
h3{{font-size:1.05rem;margin:1.4rem 0 .4rem}}
p{{margin:.5rem 0;max-width:72ch;overflow-wrap:anywhere}}
section{{padding:1.6rem 0;border-top:1px solid var(--rule)}}
a{{color:var(--accent)}}
code{{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.9em;background:var(--panel);
 padding:.1em .3em;border-radius:3px;overflow-wrap:anywhere}}
nav ul{{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem 1rem;padding:0;margin:.8rem 0}}
nav a{{display:inline-block;padding:.2rem 0}}
.eyebrow,.from,figcaption,caption{{color:var(--muted);font-size:.875rem}}
.lead{{font-size:1.15rem}}
.badge{{display:inline-block;font-weight:700;padding:.15rem .7rem;border:2px solid currentColor;border-radius:99px}}
.certified{{color:var(--good)}} .uncertified{{color:var(--warn)}} .worse{{color:var(--bad)}}
.cards{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,205px),1fr));gap:.8rem;
 margin:1rem 0;padding:0;list-style:none}}
.cards li{{background:var(--panel);border-radius:8px;padding:.8rem 1rem}}
.cards b{{display:block;font-size:1.4rem;line-height:1.25}}
.cards span{{color:var(--muted);font-size:.9rem}}
.pair{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:0 2rem;align-items:start}}
.pair>*{{min-width:0}}
figure{{margin:1rem 0;max-width:560px}}
svg{{display:block;width:100%;height:auto}}
.scroll{{overflow-x:auto;margin:1rem 0;max-width:100%}}
.scroll:focus-visible,a:focus-visible{{outline:2px solid var(--accent);outline-offset:2px}}
table{{border-collapse:collapse;font-size:.925rem;font-variant-numeric:tabular-nums}}
caption{{text-align:left;padding-bottom:.4rem;max-width:min(72ch,calc(100vw - 2rem));position:sticky;left:0}}
th,td{{padding:.4rem 1.1rem .4rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--rule)}}
thead th{{border-bottom:2px solid var(--edge);vertical-align:bottom}}
tbody th{{font-weight:600;min-width:7rem;position:sticky;left:0;background:var(--page)}}
th,td{{overflow-wrap:break-word;max-width:24rem}}
.pair.wide{{grid-template-columns:repeat(auto-fit,minmax(min(100%,480px),1fr))}}
.bins tbody th{{min-width:0}} .dense{{font-size:.85rem}} .dense th,.dense td{{padding-right:.75rem}}
.n{{text-align:right}} td.n{{white-space:nowrap}}
.texts td{{min-width:9rem}} .texts tbody th{{font-weight:400;min-width:15rem}}
.matrix td,.matrix thead th{{text-align:right;padding:.35rem .6rem;max-width:9rem;white-space:normal}}
.matrix thead th:first-child{{text-align:left;padding-left:0}}
.matrix td.cell{{white-space:nowrap;border:1px solid var(--rule)}}
.matrix td.hit{{background:color-mix(in srgb,var(--good) var(--s),var(--page))}}
.matrix td.miss{{background:color-mix(in srgb,var(--bad) var(--s),var(--page))}}
dl{{display:grid;grid-template-columns:minmax(9rem,auto) 1fr;gap:.35rem 1.2rem;margin:1rem 0}}
dt{{color:var(--muted)}} dd{{margin:0;overflow-wrap:anywhere;min-width:0}}
pre{{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;
 font:.85em/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}}
footer{{padding:1.2rem 1rem 3rem;color:var(--muted);font-size:.875rem}}
svg text{{font-size:12px;fill:var(--text)}}
svg .tick{{fill:var(--muted);font-size:11px}} svg .name{{font-size:11px}}
svg .strong{{fill:var(--text);font-weight:700}}
.grid{{stroke:var(--rule);stroke-width:.7}} .axis{{stroke:var(--edge);stroke-width:1}}
.zero{{stroke:var(--edge);stroke-dasharray:3 3}} .margin{{stroke:var(--text);stroke-width:2}}
.beyond{{fill:var(--bad);fill-opacity:.12}}
.interval{{stroke-width:2.5}} .interval.pass{{stroke:var(--good)}} .interval.fail{{stroke:var(--bad)}}
.dot{{fill:var(--accent)}} .dot.pass{{fill:var(--good)}} .dot.fail{{fill:var(--bad)}}
.mark{{stroke:var(--page);stroke-width:1}} .mark.other{{fill:var(--page);stroke:var(--edge);stroke-width:1.5}}
.mark.onfront{{fill:var(--accent)}} .mark.shipped{{fill:var(--good)}} .mark.reference{{fill:var(--text)}}
.ring{{fill:none;stroke:var(--good);stroke-width:2}} .front{{fill:none;stroke:var(--accent);stroke-width:1.5}}
.halo{{paint-order:stroke;stroke:var(--page);stroke-width:3px;stroke-linejoin:round}}
.leader{{stroke:var(--edge);stroke-width:.8}}
.diagonal{{stroke:var(--edge);stroke-dasharray:4 3}} .curve{{fill:none;stroke:var(--accent);stroke-width:1.5}}
.gap{{stroke:var(--warn);stroke-width:2}}
.field{{fill:var(--panel);stroke:var(--rule)}} .hit{{fill:var(--accent)}} .miss{{fill:var(--bad)}}
{_HEATS}{_TIERS}.tier{{fill:var(--c)}} svg .in{{fill:var(--tint);font-weight:700}}
@media (max-width:480px){{tbody th{{max-width:9rem}} .texts tbody th{{position:static;max-width:none}}
 dl{{grid-template-columns:1fr;gap:0}} dd{{margin-bottom:.6rem}}}}
@media print{{
 :root{{color-scheme:light;{_variables(LIGHT)}}} body{{font-size:10.5pt}} nav{{display:none}}
 .scroll{{overflow:visible}}
 header,main,footer{{max-width:none;padding:0}} section{{padding:.8rem 0}} h2,h3,caption{{break-after:avoid}}
 figure,tr,.cards{{break-inside:avoid}} table{{font-size:8.5pt}}
 *{{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
}}
"""
