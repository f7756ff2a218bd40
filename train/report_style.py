"""The style sheet of the report; light and dark by what the reader's system asks for."""

STYLE = """
:root {
  --page: #f6f7f9; --card: #ffffff; --ink: #17202c; --soft: #5b6776; --rule: #e3e7ec; --stage: #f0f3f7;
  --accent: #2f6fde; --warn: #c4320a; --note: #fff6e5; --note-rule: #f0d9a8;
  --s0: #2f6fde; --s1: #d9730d; --s2: #1a9367; --s3: #a33ea1; --s4: #8a6d00; --s5: #c2334d;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #11151b; --card: #1a2029; --ink: #e6eaf0; --soft: #98a4b3; --rule: #2b333f; --stage: #212934;
    --accent: #6ea3ff; --warn: #ff8a65; --note: #2b2617; --note-rule: #4d4324;
    --s0: #6ea3ff; --s1: #f0a050; --s2: #4cc493; --s3: #d487d2; --s4: #d3b545; --s5: #f07d91;
  }
  img { filter: brightness(.88); }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.45;
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 20px 8px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 34px 0 12px; }
h3 { font-size: 14px; margin: 0 0 6px; }
p { margin: 0 0 12px; max-width: 75ch; }
header p, .soft, small, figcaption span { color: var(--soft); }
small { font-size: 13px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 18px 0 0; }
.tile, figure, details, .card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.tile { padding: 12px 16px; display: flex; flex-direction: column; min-width: 0; overflow-wrap: anywhere; }
.tile span { font-size: 13px; color: var(--soft); }
.tile strong { font-size: 26px; line-height: 1.25; font-weight: 650; font-variant-numeric: tabular-nums; }
.tile strong.text { font-size: 17px; line-height: 1.6; }
aside { background: var(--note); border: 1px solid var(--note-rule); border-radius: 10px; margin: 14px 0 0;
  padding: 10px 16px; font-size: 14px; overflow-wrap: anywhere; }
aside ul, .list { margin: 0; padding-left: 18px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 500; font-size: 13px; color: var(--soft); white-space: nowrap; }
td { text-align: right; white-space: nowrap; }
th, td { padding: 7px 10px; border-bottom: 1px solid var(--rule); vertical-align: top; }
tbody tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child, .text th, .text td { text-align: left; }
.text td { white-space: normal; overflow-wrap: anywhere; }
.text td:first-child, .text td:nth-last-child(2) { white-space: nowrap; color: var(--soft); }
td.hash, .hash { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; word-break: break-all; }
tr.ahead td { color: var(--soft); }
.card { padding: 4px 8px; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr)); gap: 12px; }
figure { margin: 0; padding: 12px 12px 6px; min-width: 0; }
figcaption { display: flex; justify-content: space-between; gap: 12px; font-size: 14px; font-weight: 600;
  padding: 0 4px 4px; }
figcaption span { font-weight: 400; font-variant-numeric: tabular-nums; white-space: nowrap; }
figure p { color: var(--soft); font-size: 14px; padding: 24px 4px; margin: 0; }
svg { display: block; width: 100%; height: auto; }
svg text { font: 11px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; fill: var(--soft);
  font-variant-numeric: tabular-nums; }
svg text.value { fill: var(--ink); font-weight: 600; font-size: 12px; }
.grid { stroke: var(--rule); stroke-width: 1; }
.axis { stroke: var(--soft); stroke-width: 1; opacity: .6; }
.stage { fill: var(--stage); }
.line { fill: none; stroke: var(--accent); stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.band { fill: var(--accent); opacity: .17; }
.bad { stroke: var(--warn); stroke-width: 1.5; }
.used { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 3 3; }
.whisker { stroke: var(--ink); stroke-width: 1.4; fill: none; }
.bar { opacity: .62; }
.line.s0 { stroke: var(--s0); } .line.s1 { stroke: var(--s1); } .line.s2 { stroke: var(--s2); }
.line.s3 { stroke: var(--s3); } .line.s4 { stroke: var(--s4); } .line.s5 { stroke: var(--s5); }
.dot.s0, .bar.s0 { fill: var(--s0); } .dot.s1, .bar.s1 { fill: var(--s1); } .dot.s2, .bar.s2 { fill: var(--s2); }
.dot.s3, .bar.s3 { fill: var(--s3); } .dot.s4, .bar.s4 { fill: var(--s4); } .dot.s5, .bar.s5 { fill: var(--s5); }
.key { display: flex; flex-wrap: wrap; gap: 2px 14px; padding: 2px 4px 6px; font-size: 13px; color: var(--soft); }
.key i { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 6px; }
i.s0 { background: var(--s0); } i.s1 { background: var(--s1); } i.s2 { background: var(--s2); }
i.s3 { background: var(--s3); } i.s4 { background: var(--s4); } i.s5 { background: var(--s5); }
details { margin: 0 0 12px; padding: 0 16px; }
summary { cursor: pointer; padding: 11px 0; font-weight: 600; overflow-wrap: anywhere; }
details details { border: 0; padding: 0; margin: 0; }
details details summary { font-weight: 400; padding: 4px 0 8px; }
details[open] { padding-bottom: 14px; }
img { display: block; width: 100%; height: auto; border-radius: 6px; margin: 0 0 10px; min-width: 720px; }
.groups { margin-top: 16px; display: grid; grid-template-columns: repeat(auto-fill, minmax(min(280px, 100%), 1fr));
  gap: 14px 28px; }
.groups th, .groups td { padding: 4px 6px; }
footer { max-width: 1240px; margin: 0 auto; padding: 18px 20px 30px; color: var(--soft); font-size: 13px; }
@media print { body { background: #fff; } figure, .tile, details { break-inside: avoid; } }
"""
