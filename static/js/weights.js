// How far versions moved their base, layer by layer, on one scale; and how alike two of them are.
// Asked again until it is done.
import { formatInteger } from "./formatting.js";
import { baseAxis, baseLayout, color, escapeMarkup, plotlyReady } from "./plots.js";

const box = document.getElementById("weights");
const part = (name) => box.querySelector(`[data-${name}]`);
const view = new URLSearchParams(location.search);
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
let told = null;

// Rows are layers, columns the modules in them; a module that a version does not move is empty.
function map(relative_change, layers) {
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

function drawMaps({ relative_change, layers }, versions) {
  const shown = versions.filter(({ id }) => relative_change[id]);
  const most = Math.max(...shown.flatMap(({ id }) => Object.values(relative_change[id])), 1e-12);
  const charts = shown.map(({ name }) => {
    const chart = document.createElement("div");
    chart.setAttribute("role", "img");
    chart.setAttribute("aria-label", `How far ${name} moved each layer`);
    return chart;
  });
  // all before the first is drawn: its width depends on how many there are
  part("maps").replaceChildren(...charts);
  for (const [at, { id, name }] of shown.entries()) {
    const { names, rows, z } = map(relative_change[id], layers);
    const trace = {
      type: "heatmap",
      x: names,
      y: rows,
      z,
      zmin: 0,
      zmax: most,
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

function cell(row, kind, text) {
  const made = document.createElement(kind);
  made.textContent = text;
  row.append(made);
}

function tellAlike({ similarities, outputs }, versions) {
  const names = Object.fromEntries(versions.map(({ id, name }) => [id, name]));
  const rows = [
    ...Object.entries(similarities).map(([pair, values]) => [
      pair,
      "subspace of their updates, mean of all modules",
      mean(Object.values(values)),
    ]),
    ...Object.entries(outputs).map(([pair, value]) => [pair, "what comes out (linear CKA)", value]),
  ].filter(([, , value]) => Number.isFinite(value));
  part("similarities").replaceChildren();
  if (!rows.length) return;
  const table = document.createElement("table");
  const head = table.insertRow();
  for (const title of ["How alike", "", "0 to 1"]) cell(head, "th", title);
  for (const [pair, what, value] of rows) {
    const row = table.insertRow();
    cell(
      row,
      "td",
      pair
        .split(",")
        .map((id) => names[id])
        .join(" and "),
    );
    cell(row, "td", what);
    cell(row, "td", value.toFixed(3));
  }
  part("similarities").append(table);
}

function tellOverlaps({ overlaps }) {
  const sentence = ({ first, second, ...rows }) => {
    const [one, other, shared] = [rows.first_rows, rows.second_rows, rows.shared].map(
      formatInteger,
    );
    return (
      `${first} (${one} rows to train on) and ${second} (${other}) share ${shared} rows ` +
      "word for word."
    );
  };
  document.querySelector("[data-overlaps]").textContent = overlaps.map(sentence).join(" ");
}

function draw() {
  if (!told) return;
  const { result, versions } = told;
  const still = versions.filter(({ id }) => !result.relative_change[id]).map(({ name }) => name);
  const unmoved = `${still.join(", ")} move${still.length > 1 ? "" : "s"} no weight.`;
  part("weights-words").textContent =
    `The size of each update against the weight that it moves. ${still.length ? unmoved : ""}`;
  drawMaps(result, versions);
  tellAlike(result, versions);
  tellOverlaps(result);
}

async function ask(again) {
  const body = new URLSearchParams([...view.getAll("v").map((id) => ["v", id]), ["again", again]]);
  const answer = await fetch(box.dataset.address, {
    method: "POST",
    body,
    headers: { "X-CSRFToken": box.dataset.csrf, Accept: "application/json" },
  });
  const said = await answer.json();
  if (!answer.ok || said.state === "failed") {
    part("weights-told").textContent = said.error?.message ?? said.error;
    return;
  }
  if (said.state !== "done") {
    part("weights-told").textContent = said.message ? `${said.message}…` : "waiting for a worker…";
    setTimeout(ask, 1500, "0");
    return;
  }
  part("weights-told").textContent = "";
  await plotlyReady;
  told = said;
  draw();
}

ask("1"); // what failed is tried again by whoever opens the page, and not by each look
document.addEventListener("theme", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
