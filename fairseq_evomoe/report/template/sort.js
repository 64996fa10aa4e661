"use strict";
// A click on the head of a column sorts its table: numbers by their value in data-value, the rest as text.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") === "descending" || (!head.hasAttribute("aria-sort") && head.classList.contains("text"));
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = (row) => {
        const cell = row.cells[column];
        return cell.hasAttribute("data-value") ? Number(cell.dataset.value) : cell.textContent.trim();
      };
      const compare = (a, b) => {
        const x = value(a), y = value(b);
        const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y), undefined, { numeric: true });
        return up ? order : -order;
      };
      table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
    });
  });
}
// What is folded is shown when a link leads into it, and on paper.
const unfold = () => { const at = location.hash && document.getElementById(location.hash.slice(1)); if (at) for (let up = at; up; up = up.parentElement) if (up.tagName === "DETAILS") up.open = true; };
addEventListener("hashchange", unfold);
addEventListener("beforeprint", () => { for (const fold of document.querySelectorAll("details")) fold.open = true; });
unfold();
