// Compare runs in one chart. Metric, axis and smoothing are in the URL, so that a view can be
// shared.
import { Curves, smoothValues } from "./curves.js";
import { formatInteger } from "./formatting.js";
import { baseAxis, baseLayout, color, escapeMarkup, plotlyReady } from "./plots.js";

const X_TITLES = { step: "step", total_tokens: "tokens", time: "minutes since the start" };
const page = document.getElementById("compare");
const getElement = (name) => page.querySelector(`[data-${name}]`);
const runs = JSON.parse(document.getElementById("chosen-runs").textContent);
const metrics = JSON.parse(document.getElementById("metrics").textContent);
const urlParams = new URLSearchParams(location.search);

for (const name of ["metric", "axis", "smoothing"]) {
  if (urlParams.get(name)) getElement(name).value = urlParams.get(name);
  getElement(name).addEventListener("input", () => {
    urlParams.set(name, getElement(name).value);
    history.replaceState(null, "", `?${urlParams}`);
    draw();
  });
}

async function loadRun(run) {
  const [metrics, events] = await Promise.all([
    fetch(`/api/v1/runs/${run.id}/metrics`),
    fetch(`/api/v1/runs/${run.id}/evals`),
  ]);
  if (!metrics.ok || !events.ok)
    throw new Error(`${run.name} could not be loaded (${metrics.status}).`);
  run.curves = Curves.fromLists(await metrics.json());
  run.evals = (await events.json()).evals;
  run.startTime = Math.min(run.curves.axes.time[0] ?? Infinity, run.evals[0]?.time ?? Infinity);
}

function toXValues(run, values, axis) {
  return axis === "time" ? values.map((time) => (time - run.startTime) / 60) : values;
}

function buildRunTraces(run, { metric, axis, smoothing }) {
  const line = { color: color(`chart-${run.index + 1}`), width: 2 };
  const base = {
    name: escapeMarkup(run.name.slice(0, 60)),
    legendgroup: String(run.index),
    type: "scatter",
    mode: "lines",
    line,
    hovertemplate: "%{y:.4~g}",
  };
  if (metric.event === "eval") {
    const x = toXValues(
      run,
      run.evals.map((event) => event[axis]),
      axis,
    );
    const y = run.evals.map((event) => event[metric.name]);
    return [{ ...base, mode: "lines+markers", x, y }];
  }
  const x = toXValues(run, run.curves.axes[axis], axis);
  const [faintX, y] = run.curves.buildRangeLine(axis, metric.name);
  const raw = {
    ...base,
    x: toXValues(run, faintX, axis),
    y,
    line: { ...line, width: 1 },
    opacity: 0.25,
    showlegend: false,
    hoverinfo: "skip",
    hovertemplate: undefined,
  };
  return [raw, { ...base, x, y: smoothValues(run.curves.series[metric.name].mean, smoothing) }];
}

function draw() {
  if (!runs.every((run) => run.curves)) return;
  const metric = metrics.find(({ name }) => name === getElement("metric").value);
  const options = {
    metric,
    axis: getElement("axis").value,
    smoothing: Number(getElement("smoothing").value),
  };
  const axis = baseAxis();
  const layout = {
    ...baseLayout(),
    margin: { l: 56, r: 12, t: 8, b: 44 },
    xaxis: { ...axis, title: { text: X_TITLES[options.axis], standoff: 6 } },
    yaxis: {
      ...axis,
      title: { text: metric.title.toLowerCase() },
      tickformat: metric.unit === "bytes" ? ".3s" : undefined,
    },
    legend: { orientation: "h", y: -0.16 },
    uirevision: `${metric.name} ${options.axis}`,
  };
  getElement("chart").classList.remove("skeleton");
  const config = { displayModeBar: false, responsive: true };
  window.Plotly.react(
    getElement("chart"),
    runs.flatMap((run) => buildRunTraces(run, options)),
    layout,
    config,
  );
}

Promise.all([plotlyReady, ...runs.map(loadRun)])
  .then(() => {
    const steps = runs.reduce((sum, run) => sum + run.curves.points, 0);
    getElement("status").textContent = `${formatInteger(steps)} steps`;
    draw();
  })
  .catch((error) => (getElement("status").textContent = error.message));
document.addEventListener("theme", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
