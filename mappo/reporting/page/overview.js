"use strict";
// Filter and sort the table of runs, and show the command that puts the chosen ones side by side.
(function () {
  const table = document.getElementById("runs"), body = table.tBodies[0], rows = Array.from(body.rows);
  const filter = document.getElementById("filter"), shown = document.getElementById("shown");
  const command = document.getElementById("command");

  function show() {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
    shown.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length}`;
  }

  function compare(one, other, column, isNumber) {
    const [a, b] = [one, other].map((row) => row.cells[column]);
    if (!isNumber) return a.textContent.localeCompare(b.textContent);
    const [x, y] = [a, b].map((cell) => cell.dataset.sort);
    if (x === "" || y === "") return (x === "") - (y === "");
    return Number(y) - Number(x);
  }

  table.tHead.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const head = button.closest("th"), turned = head.getAttribute("aria-sort") === "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", turned ? "descending" : "ascending");
    const isNumber = button.dataset.number === "1";
    rows.sort((one, other) => compare(one, other, head.cellIndex, isNumber));
    if (turned) rows.reverse();
    body.append(...rows);
  });

  body.addEventListener("change", () => {
    const chosen = rows.filter((row) => row.querySelector("input").checked).map((row) => row.dataset.location);
    command.hidden = !chosen.length;
    command.querySelector("code").textContent = `mappo report ${chosen.join(" ")}`;
  });

  filter.addEventListener("input", show);
  show();
})();
