// Device-hours of a month, day by day, against the budget.
import { baseAxis, baseLayout, color, plotlyReady } from "./plots.js";

const box = document.querySelector("[data-burn]");
const days = JSON.parse(document.getElementById("burn").textContent);
const budget = Number(box.dataset.budget ?? 0);

function drawChart() {
  const used = {
    x: days.map(([day]) => day),
    y: days.map(([, hours]) => hours),
    type: "scatter",
    mode: "lines+markers",
    name: "used",
    line: { width: 2, color: color("chart-1") },
    hovertemplate: "%{y:.1f} h<extra></extra>",
  };
  const line = budget
    ? [
        {
          type: "line",
          xref: "paper",
          x0: 0,
          x1: 1,
          y0: budget,
          y1: budget,
          line: { color: color("failed"), width: 1.2, dash: "dash" },
        },
      ]
    : [];
  const layout = {
    ...baseLayout(),
    margin: { l: 44, r: 8, t: 8, b: 32 },
    showlegend: false,
    shapes: line,
    xaxis: { ...baseAxis(), type: "date", tickformat: "%b %d" },
    yaxis: {
      ...baseAxis(),
      title: { text: "hours" },
      rangemode: "tozero",
      range: [0, Math.max(budget, ...used.y, 0.1) * 1.08],
    },
  };
  window.Plotly.react(box, [used], layout, { displayModeBar: false, responsive: true });
}

plotlyReady.then(drawChart);
document.addEventListener("theme", drawChart);
