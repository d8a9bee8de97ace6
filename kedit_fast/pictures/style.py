"""The one style of every page: light and dark, screens from 390 pixels on, and paper."""

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d2129; --soft: #5c6470; --line: #d9dde3; --band: #f5f6f8;
  --good: #17663a; --good-paper: #e6f4ea; --bad: #a31621; --bad-paper: #fdeaea; --neutral-paper: #eef0f3; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181d; --ink: #e4e7ec; --soft: #a0a8b4; --line: #363c46;
  --band: #1d2128; --good: #7fd6a0; --good-paper: #14301f; --bad: #ff9c9c; --bad-paper: #3b1a1d;
  --neutral-paper: #262b33; } }
body { max-width: 62rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: .4rem 0 1.5rem; letter-spacing: -.01em; text-wrap: balance; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 2.5rem 0 .75rem; padding-top: .75rem;
  border-top: 1px solid var(--line); }
p { max-width: 46rem; margin: 0 0 1rem; overflow-wrap: anywhere; }
.first-line { max-width: none; margin: 0; color: var(--soft); font-size: .95rem; }
.table { overflow-x: auto; margin: 0 0 1.25rem; }
table { border-collapse: collapse; min-width: min(100%, 24rem); font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { caption-side: top; text-align: left; padding-bottom: .5rem; font-weight: 600; }
th, td { padding: .4rem .7rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; border-bottom-width: 2px; }
tbody th { font-weight: 400; }
tbody th:not(.number) { min-width: 9rem; }
tbody tr:nth-child(even) { background: var(--band); }
.number { text-align: right; white-space: nowrap; }
thead .number { white-space: normal; }
.good { color: var(--good); background: var(--good-paper); font-weight: 600; }
.bad { color: var(--bad); background: var(--bad-paper); font-weight: 600; }
.neutral { color: var(--soft); background: var(--neutral-paper); }
/* A verdict stays in sight where its table scrolls, and so does what stands above it. */
td:is(.good, .bad, .neutral):last-child { position: sticky; right: 0; }
table:has(td:is(.good, .bad, .neutral):last-child) thead th:last-child { position: sticky; right: 0;
  background: var(--paper); }
figure { margin: 0 0 1.5rem; }
figure img { display: block; box-sizing: border-box; background: #fff; border: 1px solid var(--line);
  border-radius: 4px; }
figcaption { max-width: 46rem; margin-top: .5rem; color: var(--soft); font-size: .9rem; }
details { margin: 0 0 1.25rem; padding: .6rem .9rem; border: 1px solid var(--line); border-radius: 4px; }
summary { cursor: pointer; font-weight: 600; }
details[open] > summary { margin-bottom: .75rem; }
@media (max-width: 37.5rem) {  /* a row is a card, its headers beside its values: nothing stands outside the screen */
  table, caption, tbody, tr, tbody th, td { display: block; }
  thead { display: none; }
  tbody tr { margin: 0 0 .75rem; border: 1px solid var(--line); border-radius: 4px; }
  tbody th, tbody th.number { font-weight: 600; text-align: left; overflow-wrap: anywhere; white-space: normal; }
  td { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 1rem; padding-block: .2rem;
    border-bottom: 0; white-space: normal; overflow-wrap: anywhere; }
  td::before { content: attr(data-column); color: var(--soft); font-weight: 400; }
}
@media print {
  :root { color-scheme: light; --paper: #fff; --ink: #000; --soft: #444; --line: #bbb; --band: #fff;
    --good: #17663a; --good-paper: #fff; --bad: #a31621; --bad-paper: #fff; --neutral-paper: #fff; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  h2 { break-after: avoid; }
  figure, tr { break-inside: avoid; }
  thead { display: table-header-group; }
  .table { overflow: visible; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""
