// The timeline of the GPUs page: a bar for every run that held a device, coloured by team. Other
// parts of the page are HTMX's.
import { baseAxis, baseLayout, color, escapeMarkup, plotlyReady } from "./plots.js";

const box = document.getElementById("timeline");
const chart = box.querySelector("[data-chart]");
const span = box.querySelector("[data-span]");
const SHADES = Array.from({ length: 9 }, (_, number) => `chart-${number + 1}`);
const ROW = 24; // pixels a device: 64 of them are one and a half screens, and stay readable
let shown = [];

const clock = (seconds) => new Date(seconds * 1000);

// A colour each for the teams that held most; the rest are one, since nobody tells fifty colours
// apart.
function coloured(rows) {
  const held = new Map();
  for (const row of rows) held.set(row.team, (held.get(row.team) ?? 0) + row.to - row.from);
  const names = [...held.keys()].sort((a, b) => held.get(b) - held.get(a));
  const own = new Set(names.slice(0, SHADES.length));
  const others = `${names.length - own.size} other teams`;
  const of = (team) => (own.has(team) ? team : others);
  return { names: [...new Set([...[...own].sort(), ...names.map(of)])], of };
}

function hoverText(row) {
  const names = [row.run, row.user, row.team].map(escapeMarkup).join(", ");
  return row.preempted ? `${names}, stopped for another` : names;
}

function figure({ begin, end, rows }) {
  const devices = [...new Set(rows.map((row) => row.device))].sort((a, b) =>
    b.localeCompare(a, undefined, { numeric: true }),
  );
  const { names: teams, of } = coloured(rows);
  // what was before anything happened is not shown
  const first = Math.min(...rows.map((row) => row.from));
  const traces = teams.map((team, number) => {
    const mine = rows.filter((row) => of(row.team) === team);
    return {
      type: "bar",
      orientation: "h",
      name: escapeMarkup(team),
      y: mine.map((row) => row.device),
      base: mine.map((row) => clock(row.from)),
      x: mine.map((row) => (row.to - row.from) * 1000),
      customdata: mine.map((row) => row.id),
      text: mine.map(hoverText),
      textposition: "none",
      hovertemplate: "%{text}<br>from %{base|%b %d, %H:%M}<extra></extra>",
      marker: { color: color(SHADES[number] ?? "soft"), line: { width: 1, color: color("card") } },
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
      range: [clock(Math.max(begin, first - (end - first) / 50)), clock(end)],
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

async function draw() {
  const answer = await fetch(`${box.dataset.address}?span=${span.value}`);
  if (!answer.ok) return;
  const told = await answer.json();
  shown = told.rows;
  box.querySelector("[data-none]").hidden = shown.length > 0;
  box.querySelector("[data-left]").textContent = told.left_out
    ? `${told.left_out} earlier ones are not drawn; choose a shorter time.`
    : "";
  chart.hidden = shown.length === 0;
  if (!shown.length) return;
  await window.Plotly.react(chart, ...figure(told), { displayModeBar: false, responsive: true });
  chart.removeAllListeners?.("plotly_click");
  chart.on("plotly_click", ({ points }) =>
    location.assign(box.dataset.run.replace(/0$/, points[0].customdata)),
  );
}

plotlyReady.then(draw);
const wanted = new URLSearchParams(location.search).get("span");
if (wanted && [...span.options].some((option) => option.value === wanted)) span.value = wanted;
span.addEventListener("change", () => {
  history.replaceState(null, "", `?span=${span.value}`);
  draw();
});
document.addEventListener("theme", draw);
setInterval(() => document.hidden || draw(), 15000);

// The tables renew themselves, but not under somebody's hands.
const busy = () => document.hidden || document.querySelector("#gpus :focus, #gpus details[open]");
setInterval(() => busy() || window.htmx?.trigger("#gpus", "renew"), 5000);
