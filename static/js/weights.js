// The weight analysis of a comparison: how much each version changes its base model per layer, and
// how similar two versions are. Polls until the analysis is done.
import { formatInteger } from "./formatting.js";
import { baseAxis, baseLayout, color, escapeMarkup, plotlyReady } from "./plots.js";

const box = document.getElementById("weights");
const getElement = (name) => box.querySelector(`[data-${name}]`);
const urlParams = new URLSearchParams(location.search);
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
let analysis = null;

// Rows are layers and columns are modules. A module that a version does not change is empty.
function buildHeatmap(relative_change, layers) {
  const names = [
    ...new Set(
      Object.values(layers)
        .filter(([layer]) => layer >= 0)
        .map(([, name]) => name),
    ),
  ].sort();
  const rows = [...new Set(Object.values(layers).map(([layer]) => layer))]
    .filter((layer) => layer >= 0)
    .sort((a, b) => a - b);
  const z = rows.map(() => names.map(() => null));
  for (const [module, value] of Object.entries(relative_change)) {
    const [layer, name] = layers[module];
    if (layer >= 0) z[rows.indexOf(layer)][names.indexOf(name)] = value;
  }
  return { names, rows, z };
}

function drawHeatmaps({ relative_change, layers }, versions) {
  const movedVersions = versions.filter(({ id }) => relative_change[id]);
  const maxValue = Math.max(
    ...movedVersions.flatMap(({ id }) => Object.values(relative_change[id])),
    1e-12,
  );
  const charts = movedVersions.map(({ name }) => {
    const chart = document.createElement("div");
    chart.setAttribute("role", "img");
    chart.setAttribute("aria-label", `Size of the change of each layer by ${name}`);
    return chart;
  });
  // Insert all charts before drawing the first: their number determines its width.
  getElement("maps").replaceChildren(...charts);
  for (const [at, { id, name }] of movedVersions.entries()) {
    const { names, rows, z } = buildHeatmap(relative_change[id], layers);
    const trace = {
      type: "heatmap",
      x: names,
      y: rows,
      z,
      zmin: 0,
      zmax: maxValue,
      colorscale: [
        [0, color("sunk")],
        [1, color("chart-1")],
      ],
      colorbar: { tickformat: ".1%", thickness: 10, outlinewidth: 0 },
      hovertemplate: "layer %{y}, %{x}: %{z:.2%}<extra></extra>",
      xgap: 1,
      ygap: 1,
    };
    const layout = {
      ...baseLayout(),
      hovermode: "closest",
      height: Math.min(560, 120 + 14 * rows.length),
      margin: { l: 44, r: 8, t: 28, b: 72 },
      title: { text: escapeMarkup(name.slice(0, 60)), font: { size: 13 }, x: 0, xref: "paper" },
      xaxis: { ...baseAxis(), tickangle: -40 },
      yaxis: { ...baseAxis(), title: { text: "layer" }, autorange: "reversed" },
    };
    window.Plotly.react(charts[at], [trace], layout, { displayModeBar: false, responsive: true });
  }
}

function addCell(row, kind, text) {
  const element = document.createElement(kind);
  element.textContent = text;
  row.append(element);
}

function showSimilarities({ similarities, outputs }, versions) {
  const names = Object.fromEntries(versions.map(({ id, name }) => [id, name]));
  const rows = [
    ...Object.entries(similarities).map(([pair, values]) => [
      pair,
      "subspace of their updates, mean over modules",
      mean(Object.values(values)),
    ]),
    ...Object.entries(outputs).map(([pair, value]) => [pair, "outputs (linear CKA)", value]),
  ].filter(([, , value]) => Number.isFinite(value));
  getElement("similarities").replaceChildren();
  if (!rows.length) return;
  const table = document.createElement("table");
  const head = table.insertRow();
  for (const title of ["Similarity", "", "0 to 1"]) addCell(head, "th", title);
  for (const [pair, what, value] of rows) {
    const row = table.insertRow();
    addCell(
      row,
      "td",
      pair
        .split(",")
        .map((id) => names[id])
        .join(" and "),
    );
    addCell(row, "td", what);
    addCell(row, "td", value.toFixed(3));
  }
  getElement("similarities").append(table);
}

function showOverlaps({ overlaps }) {
  const sentence = ({ first, second, ...rows }) => {
    const [one, other, shared] = [rows.first_rows, rows.second_rows, rows.shared].map(
      formatInteger,
    );
    return (
      `${first} (${one} training rows) and ${second} (${other} training rows) have ${shared} ` +
      "identical rows."
    );
  };
  document.querySelector("[data-overlaps]").textContent = overlaps.map(sentence).join(" ");
}

function drawAnalysis() {
  if (!analysis) return;
  const { result, versions } = analysis;
  const unmovedNames = versions
    .filter(({ id }) => !result.relative_change[id])
    .map(({ name }) => name);
  const summary = ["Size of each update relative to its base weight."];
  if (unmovedNames.length) summary.push(`Without a change: ${unmovedNames.join(", ")}.`);
  getElement("weights-summary").textContent = summary.join(" ");
  drawHeatmaps(result, versions);
  showSimilarities(result, versions);
  showOverlaps(result);
}

async function requestAnalysis(again) {
  const body = new URLSearchParams([
    ...urlParams.getAll("v").map((id) => ["v", id]),
    ["again", again],
  ]);
  const response = await fetch(box.dataset.address, {
    method: "POST",
    body,
    headers: { "X-CSRFToken": box.dataset.csrf, Accept: "application/json" },
  });
  const job = await response.json();
  if (!response.ok || job.state === "failed") {
    getElement("weights-status").textContent = job.error?.message ?? job.error;
    return;
  }
  if (job.state !== "done") {
    getElement("weights-status").textContent = job.message
      ? `${job.message}…`
      : "waiting for a worker…";
    setTimeout(requestAnalysis, 1500, "0");
    return;
  }
  getElement("weights-status").textContent = "";
  await plotlyReady;
  analysis = job;
  drawAnalysis();
}

requestAnalysis("1"); // opening the page retries a failed analysis; polling does not
document.addEventListener("theme", drawAnalysis);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAnalysis);
