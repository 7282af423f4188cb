// Requests per minute of a deployment's last hour, stacked by version. HTMX updates the figures.
import { baseAxis, baseLayout, color, escapeMarkup, plotlyReady } from "./plots.js";

const box = document.getElementById("minutes");
const chart = box.querySelector("[data-chart]");
const COLORS = ["chart-1", "chart-2", "chart-3", "chart-4", "chart-5"];

async function drawChart() {
  const response = await fetch(box.dataset.address);
  if (!response.ok) return;
  const { rows, labels } = await response.json();
  box.querySelector("[data-none]").hidden = rows.length > 0;
  chart.hidden = rows.length === 0;
  if (!rows.length) return;
  const now = Date.now();
  const traces = Object.keys(labels).map((version, index) => {
    const versionRows = rows.filter((row) => String(row.version) === version);
    return {
      type: "bar",
      name: escapeMarkup(labels[version]),
      x: versionRows.map((row) => new Date(now - row.minutes_ago * 60000)),
      y: versionRows.map((row) => row.answers),
      text: versionRows.map(
        (row) =>
          `median ${row.median_seconds.toFixed(2)} s` +
          (row.failures ? `, ${row.failures} failed` : ""),
      ),
      textposition: "none",
      hovertemplate: "%{y} requests, %{text}",
      width: 50000,
      marker: { color: color(COLORS[index % COLORS.length]) },
    };
  });
  const layout = {
    ...baseLayout(),
    barmode: "stack",
    margin: { l: 40, r: 8, t: 8, b: 32 },
    xaxis: { ...baseAxis(), type: "date", range: [new Date(now - 3600000), new Date(now)] },
    yaxis: { ...baseAxis(), title: { text: "requests per minute" }, rangemode: "tozero" },
    showlegend: traces.length > 1,
    legend: { orientation: "h", y: 1.02, yanchor: "bottom" },
  };
  await window.Plotly.react(chart, traces, layout, { displayModeBar: false, responsive: true });
}

plotlyReady.then(drawChart);
document.addEventListener("theme", drawChart);
setInterval(() => document.hidden || drawChart(), 5000);
