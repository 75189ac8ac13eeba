"use strict";
const { plots, styles } = JSON.parse(document.getElementById("figures").textContent);
// A finger that drags scrolls the page; a mouse that drags zooms the plot, and finds
// plotly's buttons above it.
const mouse = matchMedia("(pointer: fine)").matches;
const config = {
  responsive: true,
  displayModeBar: mouse ? "hover" : false,
  displaylogo: false,
  showSendToCloud: false,
  modeBarButtonsToRemove: ["select2d", "lasso2d"],
};
const font = { size: 14, family: "system-ui, sans-serif" };
// the page's style sheet colours text, axes and grid, for light and dark pages alike
const clear = "rgba(0, 0, 0, 0)";
const base = {
  height: 340,
  margin: { l: 10, r: 26, t: 24, b: 10 },
  font,
  showlegend: false,
  paper_bgcolor: clear,
  plot_bgcolor: clear,
  modebar: { bgcolor: clear, color: "#888" },
  hoverlabel: { namelength: -1, font: { size: 14, color: "#fff" }, bgcolor: "#333" },
  dragmode: mouse ? "zoom" : false,
};
const pixelsPerBar = 17;

function axis(text, own) {
  // an empty title would keep its room
  const title = text ? { title: { text, standoff: 8, font: { size: 14 } } } : {};
  const look = { automargin: true, showline: true, ticks: "outside", zeroline: false };
  return { ...look, ...title, ...own };
}

function curveLook({ colour, is_plain, symbol }) {
  return {
    mode: "lines+markers",
    line: { color: colour, width: 2, dash: is_plain ? "dash" : "solid" },
    marker: {
      symbol: is_plain ? `${symbol}-open` : symbol,
      size: 9,
      color: colour,
      line: { width: 1.5, color: colour },
      // long lines get a few, only to tell them apart
      maxdisplayed: 8,
    },
  };
}

function barLook({ colour, is_plain, bar_pattern }) {
  return {
    marker: {
      color: is_plain ? clear : colour,
      line: { color: colour, width: 1.5 },
      pattern: {
        shape: bar_pattern,
        fillmode: "overlay",
        fgcolor: is_plain ? colour : "#fff",
      },
    },
  };
}

function styled(trace, hovertemplate) {
  const style = styles[trace.legendgroup];
  const whiskers = {
    type: "data",
    symmetric: false,
    thickness: 1.5,
    width: 4,
    color: style.colour,
  };
  const look = trace.type === "bar" ? barLook(style) : curveLook(style);
  const drawn = { ...trace, ...look, hovertemplate };
  for (const errors of ["error_x", "error_y"]) {
    if (trace[errors]) drawn[errors] = { ...whiskers, ...trace[errors] };
  }
  return drawn;
}

function barLayout(data) {
  const n = new Set(data.flatMap((trace) => trace.y)).size;
  const height = 120 + n * (data.length + 1) * pixelsPerBar;
  return { height, bargap: 0.25, hovermode: "closest" };
}

// a dotted line at a value of a logarithmic x axis
function thresholdLayout(threshold, text) {
  const line = { color: "#888", width: 1, dash: "dot" };
  const ends = { x0: threshold, x1: threshold, y0: 0, y1: 1, yref: "y domain" };
  const label = {
    text,
    // annotations of a logarithmic axis stand at the logarithm
    x: Math.log10(threshold),
    y: 1,
    yref: "paper",
    xanchor: "left",
    yanchor: "bottom",
    showarrow: false,
  };
  return { shapes: [{ type: "line", line, ...ends }], annotations: [label] };
}

const drawn = {};
for (const [id, { traces, axes }] of Object.entries(plots)) {
  const { x, y, hover, threshold } = document.getElementById(id).dataset;
  const data = traces.map((trace) => styled(trace, hover));
  Plotly.newPlot(
    id,
    data,
    {
      ...base,
      xaxis: axis(x, axes.xaxis),
      yaxis: axis(y, axes.yaxis),
      ...(data[0].type === "bar" ? barLayout(data) : {}),
      ...(threshold ? thresholdLayout(Number(threshold), "dense →") : {}),
    },
    config,
  );
  drawn[id] = data;
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
    for (const [id, data] of Object.entries(drawn)) {
      const traces = [...data.keys()].filter((i) => data[i].legendgroup === series);
      if (traces.length) Plotly.restyle(id, { visible }, traces);
    }
  });
}

// A click on a column header sorts by it, a second one in reverse.
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
