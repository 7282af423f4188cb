// The histogram of row lengths on the page of a dataset, redrawn when its fragment is replaced.
import { baseAxis, baseLayout, color, plotlyReady } from "./plots.js";

function drawChart() {
  const box = document.querySelector("[data-histogram]");
  const dataElement = document.getElementById("lengths");
  if (!box || !dataElement || !window.Plotly) return;
  const { edges, length, ...series } = JSON.parse(dataElement.textContent);
  const middles = edges.slice(1).map((edge, i) => (edge + edges[i]) / 2);
  const trace = (name, key) => ({
    x: middles,
    y: series[name],
    name,
    type: "scatter",
    mode: "lines",
    line: { shape: "hvh", width: 1.8, color: color(key) },
    hovertemplate: "%{y} rows",
  });
  const layout = {
    ...baseLayout(),
    margin: { l: 44, r: 8, t: 8, b: 36 },
    xaxis: { ...baseAxis(), title: { text: "tokens in a row", standoff: 4 }, rangemode: "tozero" },
    yaxis: { ...baseAxis(), title: { text: "rows" }, rangemode: "tozero" },
    legend: { orientation: "h", x: 1, xanchor: "right", y: 1.02, yanchor: "bottom" },
    shapes:
      length <= edges.at(-1)
        ? [
            {
              type: "line",
              x0: length,
              x1: length,
              yref: "paper",
              y0: 0,
              y1: 1,
              line: { color: color("failed"), width: 1.5, dash: "dash" },
            },
          ]
        : [],
  };
  window.Plotly.react(
    box,
    [trace("prompt", "chart-5"), trace("answer", "chart-3"), trace("total", "chart-1")],
    layout,
    { responsive: true, displayModeBar: false },
  );
}

document.body.addEventListener("htmx:afterSwap", drawChart);
plotlyReady.then(drawChart);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawChart);
document.addEventListener("theme", drawChart);
