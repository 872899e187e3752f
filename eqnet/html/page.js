"use strict";
const charts = JSON.parse(document.getElementById("charts").textContent);
const darkness = window.matchMedia("(prefers-color-scheme: dark)");
const drawn = new Map();

/* Okabe and Ito's palette, which readers with any colour vision tell apart; lighter shades on dark. */
function theme(dark) {
  const ink = dark ? "#e6e8ea" : "#1b1f23";
  const soft = dark ? "#a3acb5" : "#5b6570";
  const grid = dark ? "#363c42" : "#dfe3e6";
  const colors = dark
    ? ["#56b4e9", "#e69f00", "#2fc79b", "#e79ac6", "#f0e442", "#ff8f5a", "#c3c9cf"]
    : ["#0072b2", "#d55e00", "#009e73", "#b5548c", "#a67c00", "#3f95c8", "#6b7681"];
  const ordinal = { scheme: "plasma", extent: dark ? [0.3, 1] : [0, 0.82] };
  return {
    background: "transparent",
    font: "system-ui, sans-serif",
    view: { stroke: null },
    axis: { labelColor: soft, titleColor: ink, gridColor: grid, domainColor: soft, tickColor: soft, titleFontWeight: "normal", labelFontSize: 11, titleFontSize: 12 },
    axisX: { labelOverlap: "greedy", labelSeparation: 6 },
    legend: { labelColor: ink, titleColor: ink, labelFontSize: 11, titleFontSize: 12, titleFontWeight: "normal" },
    mark: { color: colors[0] },
    point: { color: colors[0] },
    bar: { color: colors[0] },
    line: { color: colors[0] },
    style: { cursor: { color: soft, stroke: soft }, reference: { color: soft, stroke: soft, strokeDash: [4, 4], strokeWidth: 1 }, front: { color: colors[2], stroke: colors[2] } },
    range: { category: colors, ordinal: ordinal },
  };
}

async function draw() {
  document.documentElement.dataset.state = "drawing";
  for (const element of document.querySelectorAll("[data-chart]")) {
    drawn.get(element)?.finalize();
    const spec = { width: "container", ...charts[element.dataset.chart] };
    const options = { mode: "vega-lite", actions: false, renderer: "svg", ast: true, config: theme(darkness.matches), tooltip: { theme: darkness.matches ? "dark" : "light" } };
    try {
      drawn.set(element, await vegaEmbed(element, structuredClone(spec), options));
    } catch (error) {
      element.textContent = "This chart could not be drawn: " + error.message;
      console.error(error);
    }
  }
  document.documentElement.dataset.state = "drawn";
}

function sort(header) {
  const table = header.closest("table");
  const column = [...header.parentNode.children].indexOf(header);
  const direction = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  for (const other of header.parentNode.children) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
  const numeric = header.classList.contains("number");
  const key = (row) => (numeric ? row.children[column].dataset.value : row.children[column].textContent);
  const compare = (a, b) => {
    const [x, y] = [key(a), key(b)];
    if (numeric) return x === "" || y === "" ? (x === "") - (y === "") : direction * (Number(x) - Number(y));
    return direction * x.localeCompare(y, undefined, { numeric: true });
  };
  const body = table.tBodies[0];
  body.append(...[...body.rows].sort(compare));
}

for (const header of document.querySelectorAll("th")) {
  header.firstElementChild.addEventListener("click", () => sort(header));
}
let queue = draw();
darkness.addEventListener("change", () => { queue = queue.then(draw); });
