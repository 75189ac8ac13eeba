"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);
// A finger that drags scrolls the page; a mouse that drags zooms the plot, and finds
// plotly's buttons above it.
const mouse = matchMedia("(pointer: fine)").matches;
const dragmode = mouse ? "zoom" : false;
const config = {
  responsive: true,
  displayModeBar: mouse ? "hover" : false,
  displaylogo: false,
  showSendToCloud: false,
  modeBarButtonsToRemove: ["select2d", "lasso2d"],
};
for (const [id, { data, layout }] of Object.entries(figures)) {
  Plotly.newPlot(id, data, { ...layout, dragmode }, config);
}

// A series of the legend is hidden and shown in every plot of the page.
const entries = document.querySelectorAll("button[data-series]");
for (const entry of entries) {
  entry.addEventListener("click", () => {
    const series = entry.dataset.series;
    const visible = entry.getAttribute("aria-pressed") === "false";
    for (const other of entries) {
      if (other.dataset.series === series) other.setAttribute("aria-pressed", visible);
    }
    for (const [id, { data }] of Object.entries(figures)) {
      const traces = [...data.keys()].filter((i) => data[i].legendgroup === series);
      if (traces.length) Plotly.restyle(id, { visible }, traces);
    }
  });
}

// A click on the head of a column sorts by it, a second one the other way round.
for (const head of document.querySelectorAll("table.sortable th")) {
  head.addEventListener("click", () => {
    const body = head.closest("table").tBodies[0];
    const ascending = head.getAttribute("aria-sort") !== "ascending";
    const value = (row) => row.cells[head.cellIndex].dataset.value ?? "";
    const order = (a, b) =>
      // what is missing comes last either way
      (value(a) === "") - (value(b) === "") ||
      (ascending ? 1 : -1) *
        (head.dataset.kind === "text"
          ? value(a).localeCompare(value(b), "en", { numeric: true })
          : value(a) - value(b));
    body.append(...[...body.rows].sort(order));
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  });
}
