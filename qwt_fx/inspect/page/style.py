"""The page's style: one column on a phone, more on a wide screen, light or dark as the system is."""

CSS = """
:root {
  color-scheme: light dark;
  --back: #f6f7f9; --card: #ffffff; --ink: #1b2430; --soft: #5a6675; --rule: #dde2e8;
  --s0: #2f6fb3; --s1: #c8641b; --s2: #2c8a57; --bad: #c0392b; --level: #b9c3cf; --code: #eef1f5;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #12161c; --card: #1b212a; --ink: #e6eaf0; --soft: #9aa7b6; --rule: #2f3844;
    --s0: #6aa9ea; --s1: #f0a05a; --s2: #67c794; --bad: #ff7b6b; --level: #47535f; --code: #242c37;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
main { max-width: 1240px; margin: 0 auto; padding: 20px 16px 56px; }
h1 { font-size: 1.6rem; margin: 0 0 2px; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 36px 0 10px; }
h3 { font-size: 1rem; margin: 0 0 2px; overflow-wrap: anywhere; }
p { margin: 4px 0 10px; }
.soft { color: var(--soft); font-size: .9rem; }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 10px 0 16px; font-size: .92rem; }
a { color: var(--s0); }
.grid { display: grid; gap: 14px; }
.grid { grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); }
.facts { display: grid; gap: 10px; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); }
.card, .fact, .scroll { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; }
.card, .fact { min-width: 0; }
.card { padding: 12px 14px; }
.fact { padding: 8px 12px; }
.fact b { display: block; font-size: 1.2rem; overflow-wrap: anywhere; }
.missing { border-style: dashed; color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 10px; text-align: right; white-space: nowrap; }
th, td { border-bottom: 1px solid var(--rule); }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
tr:last-child td { border-bottom: 0; }
tr.bad td { color: var(--bad); }
details summary { cursor: pointer; color: var(--soft); margin: 8px 0; }
pre {
  background: var(--code); padding: 10px 12px; border-radius: 8px; margin: 4px 0 10px;
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: .84rem;
}
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: .82rem; color: var(--soft); }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 5px; }
i.s0 { background: var(--s0); } i.s1 { background: var(--s1); } i.s2 { background: var(--s2); }
i.clip { background: var(--bad); } i.level { background: var(--level); }
svg { display: block; width: 100%; height: auto; margin-top: 6px; }
svg text { fill: var(--soft); font: 11px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
svg text.axis { fill: var(--ink); }
svg .gridline { stroke: var(--rule); stroke-width: 1; }
svg .s0 { fill: var(--s0); } svg .s1 { fill: var(--s1); } svg .s2 { fill: var(--s2); }
svg .clip { fill: var(--bad); }
svg .level { stroke: var(--level); stroke-width: 1; }
svg .line { fill: none; stroke-width: 2; }
svg .line.s0 { stroke: var(--s0); }
svg .line.s1 { stroke: var(--s1); }
svg .line.s2 { stroke: var(--s2); }
"""
