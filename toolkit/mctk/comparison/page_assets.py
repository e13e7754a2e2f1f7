"""Style and script of the comparison's page; both stand in the page itself."""

CSS = """
:root { --ink: #1c1e21; --soft: #53585f; --line: #d9dce1; --head: #f3f5f7; --best: #e4f3ea; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); line-height: 1.5;
  font: 16px/1.5 system-ui, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif; }
main, header, footer { max-width: 1180px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 28px; }
header pre { white-space: pre-wrap; overflow-wrap: anywhere; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 6px; }
h2 { font-size: 21px; margin: 44px 0 10px; }
h3 { font-size: 16px; margin: 18px 0 6px; }
p, ul, dl { margin: 8px 0; max-width: 78ch; }
a { color: #0b57a4; }
code, pre { font-family: ui-monospace, 'DejaVu Sans Mono', Consolas, monospace; font-size: 13.5px; }
pre { background: var(--head); border: 1px solid var(--line); border-radius: 6px;
  padding: 10px 12px; overflow-x: auto; margin: 8px 0; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; max-width: none; }
.facts dt { color: var(--soft); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
nav ul { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: 4px 18px; }
.soft { color: var(--soft); }
.choice { display: flex; flex-wrap: wrap; gap: 6px; align-items: center; margin: 10px 0; }
.choice button { font: inherit; font-size: 14px; padding: 3px 12px; border: 1px solid #9aa1a9;
  border-radius: 16px; background: #fff; color: var(--ink); cursor: pointer; }
.choice button[aria-pressed=true] { background: #22406b; border-color: #22406b; color: #fff; }
.scroll { overflow: auto; max-height: 88vh; border: 1px solid var(--line); border-radius: 6px; }
.scroll:focus-visible { outline: 2px solid #0b57a4; }
table { border-collapse: separate; border-spacing: 0; font-size: 14px;
  font-variant-numeric: tabular-nums; }
th, td { padding: 4px 10px; text-align: right; white-space: nowrap;
  border-bottom: 1px solid #eceef1; background: #fff; }
th:first-child, th.left, td.left { text-align: left; }
.board { width: 100%; }
.board thead th { position: sticky; top: 0; z-index: 2; background: var(--head);
  border-bottom: 2px solid var(--line); vertical-align: bottom; padding: 0; }
.board thead th:first-child { left: 0; z-index: 4; padding: 4px 10px; }
.board thead button { font: inherit; font-weight: 600; border: 0; background: none; color: inherit;
  padding: 6px 10px; width: 100%; min-width: 66px; text-align: right; white-space: normal;
  cursor: pointer; }
.board thead th:first-child button { text-align: left; padding: 6px 0; }
.board thead button:hover { background: #e3e8ee; }
.board thead th[aria-sort=ascending] button::after { content: ' \\25B2'; font-size: 10px; }
.board thead th[aria-sort=descending] button::after { content: ' \\25BC'; font-size: 10px; }
.board tbody th { position: sticky; left: 0; z-index: 1; font-weight: 400; text-align: left;
  min-width: 190px; border-right: 1px solid var(--line); }
.board tr.group th { background: var(--head); font-weight: 600; border-top: 2px solid var(--line);
  position: static; border-right: 0; }
.board tr.group span { position: sticky; left: 10px; }
.board tr.original th, .board tr.original td { background: #fbfbf3; }
.board tr.best th a { font-weight: 700; }
.board tr:hover td, .board tr:hover th { background: #f5f9ff; }
.board tr.group:hover th { background: var(--head); }
.board td.best { font-weight: 700; background: var(--best); }
.board small { color: var(--soft); }
.board th a { color: inherit; text-decoration: none; border-bottom: 1px dotted #9aa1a9; }
.mark { display: inline-block; width: 1.3em; }
.dot { display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 7px;
  border: 2px solid; vertical-align: 0; }
.failed td { text-align: left; white-space: normal; color: #7a1c1c; }
.quality-only .cost, .cost-only .quality { display: none; }
details { border: 1px solid var(--line); border-radius: 6px; margin: 6px 0; padding: 0 12px; }
details[open] { padding-bottom: 10px; }
summary { cursor: pointer; padding: 6px 0; }
td details { border: 0; margin: 0; padding: 0; }
td summary { padding: 0; }
.wide { overflow-x: auto; }
.plain { margin: 6px 0; }
.plain th { background: var(--head); font-weight: 600; }
.plain td.words { white-space: normal; text-align: left; min-width: 260px; }
figure { margin: 26px 0 36px; }
figure h3 { margin: 0 0 8px; font-size: 17px; }
.picture { overflow-x: auto; }
.picture svg { display: block; width: 100%; min-width: 700px; max-width: 1080px; height: auto; }
figcaption { max-width: 82ch; color: #33373c; margin-top: 8px; font-size: 15px; }
footer { padding: 30px 20px 50px; }
@media (max-width: 640px) {
  body { font-size: 15px; }
  main, header, footer { padding-left: 12px; padding-right: 12px; }
  .facts { grid-template-columns: 1fr; }
  .facts dd { margin-bottom: 6px; }
  .board tbody th { min-width: 130px; max-width: 150px; white-space: normal; }
}
@media print {
  @page { size: A4 landscape; margin: 12mm; }
  body { font-size: 10.5pt; }
  .scroll { max-height: none; overflow: visible; border: 0; }
  .board { font-size: 7.5pt; }
  .board th, .board td { padding: 1.5pt 4pt; position: static !important; min-width: 0 !important; }
  .board thead button { display: contents; }
  .choice, nav { display: none; }
  figure, tr { break-inside: avoid; }
  .picture svg { min-width: 0; max-height: 125mm; width: auto; max-width: 100%; }
  h2, h3 { break-after: avoid; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""

# Rows are sorted within their budget; what has no figure stays at the end.
SCRIPT = """
'use strict';
const board = document.getElementById('board');
const number = (row, at) => {
  const cell = row.cells[at];
  return cell && cell.dataset.value !== undefined ? parseFloat(cell.dataset.value) : NaN;
};
const sort = (head) => {
  const down = head.getAttribute('aria-sort') === 'ascending'
    || (!head.hasAttribute('aria-sort') && head.dataset.better === 'high');
  for (const other of board.tHead.rows[0].cells) other.removeAttribute('aria-sort');
  head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
  const at = head.cellIndex;
  for (const body of board.tBodies) {
    const rows = [...body.rows].filter((row) => row.dataset.place !== undefined);
    rows.sort((a, b) => {
      if (at === 0) {
        const order = a.dataset.name.localeCompare(b.dataset.name);
        return down ? -order : order;
      }
      const x = number(a, at), y = number(b, at);
      if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y);
      return (down ? y - x : x - y) || a.dataset.place - b.dataset.place;
    });
    body.append(...rows);
  }
};
for (const head of board.tHead.rows[0].cells) {
  const button = head.querySelector('button');
  if (button) button.addEventListener('click', () => sort(head));
}
const choices = [...document.querySelectorAll('.choice button')];
const show = (name) => {
  board.className = 'board ' + name;
  for (const button of choices) button.setAttribute('aria-pressed', button.dataset.show === name);
};
for (const button of choices) button.addEventListener('click', () => show(button.dataset.show));
if (choices.length) show('quality-only');
const open = () => {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target && target.tagName === 'DETAILS') { target.open = true; target.scrollIntoView(); }
};
window.addEventListener('hashchange', open);
open();
"""
