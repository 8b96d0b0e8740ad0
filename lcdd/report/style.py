"""The report's style sheet: light and dark by the reader's setting, narrow screens, and print."""

STYLE = """
:root { color-scheme: light dark;
  --bg: #f6f7f9; --card: #ffffff; --text: #1c2330; --soft: #5b6677; --line: #dfe3ea; --track: #e6e9ef;
  --s0: #2563c9; --s1: #c2571a; --s2: #1a8a5f; --s3: #8b4bc4; --s4: #b8306e; --s5: #6b7280; --s6: #927300;
  --s7: #0e7f92;
  --heat: #2563c9; --on: #ffffff; --mark: #e8f3ee; --markline: #1a8a5f; --warn: #fff4e0; --warnline: #d88a12; }
@media (prefers-color-scheme: dark) { :root {
  --bg: #12151b; --card: #1a1f28; --text: #e6eaf1; --soft: #9aa6b8; --line: #2c3441; --track: #2a313d;
  --s0: #6ea4ff; --s1: #f0955a; --s2: #4cc795; --s3: #bd90ee; --s4: #ee78ab; --s5: #9aa3b2; --s6: #d8b53c;
  --s7: #4fc3d8;
  --heat: #4b86ea; --on: #ffffff; --mark: #17291f; --markline: #4cc795; --warn: #33260f; --warnline: #d88a12; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--text); -webkit-text-size-adjust: 100%;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
header { margin-bottom: 2rem; }
.eyebrow { margin: 0; color: var(--s0); font-size: .8rem; font-weight: 600; letter-spacing: .08em;
  text-transform: uppercase; }
h1 { margin: .2rem 0 .8rem; font-size: clamp(1.6rem, 4.5vw, 2.4rem); line-height: 1.15; letter-spacing: -.02em; }
h2 { margin: 0 0 .9rem; font-size: 1.2rem; letter-spacing: -.01em; }
h3 { margin: 1.6rem 0 .4rem; font-size: 1rem; }
p { margin: 0 0 .9rem; max-width: 46rem; }
.lead { font-size: 1.08rem; }
.tags { display: flex; flex-wrap: wrap; gap: .5rem; margin: 0; padding: 0; list-style: none; color: var(--soft);
  font-size: .85rem; }
.tags li { padding: .15rem .7rem; border: 1px solid var(--line); border-radius: 999px; background: var(--card); }
section { margin: 0 0 1.25rem; padding: 1.4rem 1.5rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 14px; }
section > :last-child { margin-bottom: 0; }
.scroll { overflow-x: auto; margin: 0 -.3rem .9rem; padding: 0 .3rem; }
table { width: 100%; border-collapse: collapse; font-size: .92rem; }
th, td { padding: .55rem .8rem .55rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
tbody tr:last-child > * { border-bottom: 0; }
thead th { color: var(--soft); font-size: .78rem; font-weight: 600; white-space: nowrap; }
tbody th { font-weight: 600; overflow-wrap: anywhere; min-width: 9rem; }
th small { display: block; color: var(--soft); font-weight: 400; line-height: 1.35; }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.num { white-space: nowrap; } .rate { white-space: nowrap; min-width: 10.5rem; } .rate span { font-weight: 600; }
.rate small { color: var(--soft); } .bar { display: block; width: 150px; height: 18px; }
.track { stroke: var(--track); stroke-width: 4; stroke-linecap: round; }
.axis { stroke: var(--soft); stroke-width: 1; } .whisker { stroke-width: 4; stroke-linecap: round; opacity: .45; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(7.5rem, 1fr)); gap: .7rem; margin: 0 0 .9rem; }
.cards div { padding: .7rem .9rem; border: 1px solid var(--line); border-radius: 10px; }
.cards dt { color: var(--soft); font-size: .8rem; }
.cards dd { margin: 0; font-size: 1.3rem; font-weight: 650; font-variant-numeric: tabular-nums; }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: .9rem; }
article { border: 1px solid var(--line); border-radius: 10px; overflow: hidden; break-inside: avoid; }
.prompt { margin: 0; padding: .6rem .9rem; background: var(--bg); font-weight: 600; overflow-wrap: anywhere; }
article dl { margin: 0; padding: .3rem 0; }
.answer { display: grid; grid-template-columns: 9.5rem 1fr; gap: .7rem; padding: .25rem .9rem;
  border-left: 3px solid transparent; font-size: .9rem; }
.answer dt { color: var(--soft); overflow-wrap: anywhere; }
.answer dd { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap; }
.answer em { color: var(--soft); } .answer.same { background: var(--mark); border-left-color: var(--markline); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: .4rem 2rem; }
figure { margin: 0 0 1.2rem; } figure svg { display: block; width: 100%; height: auto; }
figcaption { margin-bottom: .35rem; font-size: .9rem; font-weight: 600; }
.keys { display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin-top: .1rem; color: var(--soft); font-size: .82rem;
  font-weight: 400; }
.keys b { color: var(--text); font-variant-numeric: tabular-nums; }
.swatch { display: inline-block; width: .8em; height: .8em; margin-right: .35em; border-radius: 3px; }
.grid { stroke: var(--line); stroke-width: 1; }
.tick { fill: var(--soft); font-size: 12px; font-family: inherit; font-variant-numeric: tabular-nums; }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.cell { fill: var(--heat); } .cell-on, .cell-off { font-size: 11.5px; font-variant-numeric: tabular-nums; }
.cell-on { fill: var(--on); } .cell-off { fill: var(--text); }
details { margin: 0 0 .6rem; border-top: 1px solid var(--line); padding-top: .6rem; }
summary { cursor: pointer; font-weight: 600; font-size: .95rem; margin-bottom: .5rem; }
pre { margin: 0; padding: .9rem; overflow-x: auto; background: var(--bg); border-radius: 8px; font-size: .8rem;
  line-height: 1.45; }
.claims { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: .9rem; }
.claim { border-left: 4px solid var(--line); } .claim.held { border-left-color: var(--s2); }
.claim.failed { border-left-color: var(--s1); } .claim .evidence { padding: 0 .9rem; }
.claim table { font-size: .84rem; margin: 0; } .claim .scroll { margin-bottom: .2rem; } .claim th { font-weight: 400; }
.verdict { display: block; color: var(--soft); font-size: .78rem; text-transform: uppercase; letter-spacing: .04em; }
.held .verdict { color: var(--s2); } .failed .verdict { color: var(--s1); }
.note { color: var(--soft); font-size: .86rem; }
.missing { padding: .6rem .9rem; border: 1px dashed var(--line); border-radius: 8px; color: var(--soft); }
.warning { padding: .7rem 1rem; border-left: 4px solid var(--warnline); border-radius: 6px; background: var(--warn);
  max-width: none; }
@media (max-width: 34rem) { tbody th { min-width: 6.5rem; font-size: .85rem; }
  .rate { min-width: 7.2rem; } .rate small { display: block; } .bar { width: 105px; height: 13px; }
  main { padding: 1.5rem .8rem 3rem; } section { padding: 1.1rem 1rem; }
  .answer { grid-template-columns: 1fr; gap: 0; } .tick { font-size: 15px; } .cell-on, .cell-off { font-size: 13px; } }
@media print { :root { color-scheme: light; --bg: #ffffff; --card: #ffffff; --text: #000000; --soft: #444444;
  --line: #cccccc; --track: #e6e9ef; --s0: #2563c9; --s1: #c2571a; --s2: #1a8a5f; --s3: #8b4bc4; --heat: #2563c9;
  --mark: #eeeeee; }
  body { font-size: 10.5pt; } main { max-width: none; padding: 0; } section { border: 0; padding: 0 0 1rem; }
  .scroll { overflow: visible; } figure, tr, article, .cards div { break-inside: avoid; } h2, h3 { break-after: avoid; }
  .swatch, .cell, .answer.same { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
""" + "".join(
    f".line.s{i}, .whisker.s{i} {{ stroke: var(--s{i}); }} .dot.s{i} {{ fill: var(--s{i}); }} "
    f".swatch.s{i} {{ background: var(--s{i}); }}\n"
    for i in range(8)
)
