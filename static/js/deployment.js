// A deployment's last hour: answers a minute, stacked by version. The figures above it are HTMX's.
import { baseAxis, baseLayout, color, escapeMarkup, plotlyReady } from "./plots.js";

const box = document.getElementById("minutes");
const chart = box.querySelector("[data-chart]");
const SHADES = ["chart-1", "chart-2", "chart-3", "chart-4", "chart-5"];

async function draw() {
  const answer = await fetch(box.dataset.address);
  if (!answer.ok) return;
  const { rows, labels } = await answer.json();
  box.querySelector("[data-none]").hidden = rows.length > 0;
  chart.hidden = rows.length === 0;
  if (!rows.length) return;
  const now = Date.now();
  const traces = Object.keys(labels).map((version, number) => {
    const mine = rows.filter((row) => String(row.version) === version);
    return {
      type: "bar",
      name: escapeMarkup(labels[version]),
      x: mine.map((row) => new Date(now - row.minutes_ago * 60000)),
      y: mine.map((row) => row.answers),
      text: mine.map(
        (row) =>
          `median ${row.median_seconds.toFixed(2)} s` +
          (row.failures ? `, ${row.failures} failed` : ""),
      ),
      textposition: "none",
      hovertemplate: "%{y} answers, %{text}",
      width: 50000,
      marker: { color: color(SHADES[number % SHADES.length]) },
    };
  });
  const layout = {
    ...baseLayout(),
    barmode: "stack",
    margin: { l: 40, r: 8, t: 8, b: 32 },
    xaxis: { ...baseAxis(), type: "date", range: [new Date(now - 3600000), new Date(now)] },
    yaxis: { ...baseAxis(), title: { text: "answers a minute" }, rangemode: "tozero" },
    showlegend: traces.length > 1,
    legend: { orientation: "h", y: 1.02, yanchor: "bottom" },
  };
  await window.Plotly.react(chart, traces, layout, { displayModeBar: false, responsive: true });
}

plotlyReady.then(draw);
document.addEventListener("theme", draw);
setInterval(() => document.hidden || draw(), 5000);
