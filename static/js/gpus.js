// The timeline of the GPUs page: a bar for every run on a device, colored by team. HTMX updates the
// other parts of the page.
import { baseAxis, baseLayout, color, escapeMarkup, plotlyReady } from "./plots.js";

const box = document.getElementById("timeline");
const chart = box.querySelector("[data-chart]");
const span = box.querySelector("[data-span]");
const COLORS = Array.from({ length: 9 }, (_, number) => `chart-${number + 1}`);
const ROW = 24; // pixels per device: 64 devices take one and a half screens and stay readable
let drawnRows = [];

const toDate = (seconds) => new Date(seconds * 1000);

// The teams with the most device time have a color each. All others share one, since fifty colors
// would not be distinguishable.
function assignColorGroups(rows) {
  const deviceSeconds = new Map();
  for (const row of rows)
    deviceSeconds.set(row.team, (deviceSeconds.get(row.team) ?? 0) + row.to - row.from);
  const names = [...deviceSeconds.keys()].sort(
    (a, b) => deviceSeconds.get(b) - deviceSeconds.get(a),
  );
  const coloredTeams = new Set(names.slice(0, COLORS.length));
  const others = `${names.length - coloredTeams.size} other teams`;
  const getColorGroup = (team) => (coloredTeams.has(team) ? team : others);
  return {
    names: [...new Set([...[...coloredTeams].sort(), ...names.map(getColorGroup)])],
    getColorGroup,
  };
}

function formatHoverText(row) {
  const names = [row.run, row.user, row.team].map(escapeMarkup).join(", ");
  return row.preempted ? `${names}, preempted` : names;
}

function buildFigure({ begin, end, rows }) {
  const devices = [...new Set(rows.map((row) => row.device))].sort((a, b) =>
    b.localeCompare(a, undefined, { numeric: true }),
  );
  const { names: teams, getColorGroup } = assignColorGroups(rows);
  // The chart starts shortly before the first run.
  const first = Math.min(...rows.map((row) => row.from));
  const traces = teams.map((team, number) => {
    const teamRows = rows.filter((row) => getColorGroup(row.team) === team);
    return {
      type: "bar",
      orientation: "h",
      name: escapeMarkup(team),
      y: teamRows.map((row) => row.device),
      base: teamRows.map((row) => toDate(row.from)),
      x: teamRows.map((row) => (row.to - row.from) * 1000),
      customdata: teamRows.map((row) => row.id),
      text: teamRows.map(formatHoverText),
      textposition: "none",
      hovertemplate: "%{text}<br>from %{base|%b %d, %H:%M}<extra></extra>",
      marker: { color: color(COLORS[number] ?? "soft"), line: { width: 1, color: color("card") } },
    };
  });
  const layout = {
    ...baseLayout(),
    hovermode: "closest",
    barmode: "overlay",
    bargap: 0.25,
    height: 110 + ROW * devices.length,
    margin: { l: 8, r: 8, t: 8, b: 48 },
    xaxis: {
      ...baseAxis(),
      type: "date",
      range: [toDate(Math.max(begin, first - (end - first) / 50)), toDate(end)],
      nticks: box.clientWidth / 110,
      tickangle: 0,
    },
    yaxis: {
      ...baseAxis(),
      automargin: true,
      type: "category",
      categoryorder: "array",
      categoryarray: devices,
      fixedrange: true,
    },
    showlegend: teams.length > 1,
    legend: { orientation: "h", y: 1.02, yanchor: "bottom" },
  };
  return [traces, layout];
}

async function drawChart() {
  const response = await fetch(`${box.dataset.address}?span=${span.value}`);
  if (!response.ok) return;
  const timeline = await response.json();
  drawnRows = timeline.rows;
  box.querySelector("[data-none]").hidden = drawnRows.length > 0;
  box.querySelector("[data-left]").textContent = timeline.left_out
    ? `${timeline.left_out} earlier ones are not drawn; choose a shorter time.`
    : "";
  chart.hidden = drawnRows.length === 0;
  if (!drawnRows.length) return;
  await window.Plotly.react(chart, ...buildFigure(timeline), {
    displayModeBar: false,
    responsive: true,
  });
  chart.removeAllListeners?.("plotly_click");
  chart.on("plotly_click", ({ points }) =>
    location.assign(box.dataset.run.replace(/0$/, points[0].customdata)),
  );
}

plotlyReady.then(drawChart);
const urlSpan = new URLSearchParams(location.search).get("span");
if (urlSpan && [...span.options].some((option) => option.value === urlSpan)) span.value = urlSpan;
span.addEventListener("change", () => {
  history.replaceState(null, "", `?span=${span.value}`);
  drawChart();
});
document.addEventListener("theme", drawChart);
setInterval(() => document.hidden || drawChart(), 15000);

// Refresh the tables, but not while the user is interacting with them.
const isBusy = () => document.hidden || document.querySelector("#gpus :focus, #gpus details[open]");
setInterval(() => isBusy() || window.htmx?.trigger("#gpus", "renew"), 5000);
