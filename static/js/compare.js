// Several runs in one chart. What is shown, over what and how smooth lives in the address, so that a view can be shared.
import { axisLook, colour, look } from "./charts.js";
import { Curves, smoothed } from "./curves.js";
import { whole } from "./words.js";

const X_TITLES = { step: "step", total_tokens: "tokens", time: "minutes since the start" };
const page = document.getElementById("compare");
const part = (name) => page.querySelector(`[data-${name}]`);
const runs = JSON.parse(document.getElementById("chosen-runs").textContent);
const view = new URLSearchParams(location.search);
const plotly = window.Plotly ? Promise.resolve() : new Promise((ready) => document.getElementById("plotly").addEventListener("load", ready));

for (const name of ["metric", "axis", "smoothing"]) {
  if (view.get(name)) part(name).value = view.get(name);
  part(name).addEventListener("input", () => {
    view.set(name, part(name).value);
    history.replaceState(null, "", `?${view}`);
    draw();
  });
}

async function load(run) {
  const [metrics, events] = await Promise.all([fetch(`/api/v1/runs/${run.id}/metrics`), fetch(`/api/v1/runs/${run.id}/evals`)]);
  if (!metrics.ok || !events.ok) throw new Error(`${run.name} could not be loaded (${metrics.status}).`);
  run.curves = Curves.fromLists(await metrics.json());
  run.evals = (await events.json()).evals;
  run.began = Math.min(run.curves.axes.time[0] ?? Infinity, run.evals[0]?.time ?? Infinity);
}

// plotly reads a few tags in names; a name is text.
const plain = (name) => name.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

function xs(run, places, axis) {
  return axis === "time" ? places.map((time) => (time - run.began) / 60) : places;
}

function traces(run, { metric, axis, smoothing }) {
  const line = { color: colour(`chart-${run.place + 1}`), width: 2 };
  const base = { name: plain(run.name.slice(0, 60)), legendgroup: String(run.place), type: "scatter", mode: "lines", line, hovertemplate: "%{y:.4~g}" };
  if (metric === "heldout_loss") {
    return [{ ...base, mode: "lines+markers", x: xs(run, run.evals.map((e) => e[axis]), axis), y: run.evals.map((e) => e.heldout_loss) }];
  }
  const x = xs(run, run.curves.axes[axis], axis);
  const [faintX, y] = run.curves.spread(axis, metric);
  const raw = { ...base, x: xs(run, faintX, axis), y, line: { ...line, width: 1 }, opacity: 0.25, showlegend: false, hoverinfo: "skip", hovertemplate: undefined };
  return [raw, { ...base, x, y: smoothed(run.curves.series[metric].mean, smoothing) }];
}

function draw() {
  if (!runs.every((run) => run.curves)) return;
  const asked = { metric: part("metric").value, axis: part("axis").value, smoothing: Number(part("smoothing").value) };
  const axis = axisLook();
  const layout = {
    ...look(),
    margin: { l: 56, r: 12, t: 8, b: 44 },
    xaxis: { ...axis, title: { text: X_TITLES[asked.axis], standoff: 6 } },
    yaxis: { ...axis, title: { text: part("metric").selectedOptions[0].text }, tickformat: asked.metric.includes("bytes") ? ".3s" : undefined },
    legend: { orientation: "h", y: -0.16 },
    uirevision: `${asked.metric} ${asked.axis}`,
  };
  part("chart").classList.remove("skeleton");
  window.Plotly.react(part("chart"), runs.flatMap((run) => traces(run, asked)), layout, { displayModeBar: false, responsive: true });
}

Promise.all([plotly, ...runs.map(load)])
  .then(() => {
    part("told").textContent = `${whole(runs.reduce((sum, run) => sum + run.curves.points, 0))} steps`;
    draw();
  })
  .catch((error) => (part("told").textContent = error.message));
document.addEventListener("theme", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
