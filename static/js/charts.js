// From curves to one plotly figure: rows over one x axis, so that zoom and hover go through all of them. Pure but for colors.
import { smoothed } from "./curves.js";
import { formatBytes } from "./formatting.js";
import { baseLayout, color } from "./plots.js";

const ROWS = {
  y: { title: "Loss", domain: [0.59, 1] },
  y2: { title: "Memory", domain: [0.37, 0.54] },
  y3: { title: "Learning rate", domain: [0.24, 0.32] },
  y4: { title: "Gradient norm", domain: [0.12, 0.2] },
  y5: { title: "Tokens/s", domain: [0, 0.08] },
};
const X_TITLES = { step: "step", total_tokens: "tokens", time: "minutes" };
const SYMBOLS = { load: "diamond", "first step": "star", eval: "circle", save: "square" };

// Places on the chosen axis. Time is minutes since the run's first event.
export function placer(curves, axis, began) {
  const { step } = curves.axes;
  const scale = (value) => (axis === "time" ? (value - began) / 60 : value);
  return (event) => {
    if (axis === "step") return event.step;
    if (axis === "time") return scale(event.time);
    let i = step.length - 1; // tokens: those of the nearest step before
    while (i > 0 && step[i] > event.step) i -= 1;
    return event.step > 0 && i >= 0 ? curves.axes.total_tokens[i] : 0;
  };
}

export function figure({ curves, marks, axis, smoothing, began, forecast }) {
  const scaled = axis === "time" ? (x) => x.map((t) => (t - began) / 60) : (x) => x;
  const place = placer(curves, axis, began);
  const line = (name, row, key, { title, width = 1.6, unit = "" } = {}) => {
    const [x, y] = curves.spread(axis, name);
    return { x: scaled(x), y, yaxis: row, name: title, type: "scatter", mode: curves.length === 1 ? "markers" : "lines", line: { width, color: color(key) }, hovertemplate: `%{y:.4~g}${unit}`, showlegend: false };
  };
  const evals = marks.filter((mark) => mark.kind === "eval");
  const moments = marks.filter((mark) => mark.kind === "memory");
  const traces = [
    { ...line("loss", "y", "chart-1", { title: "loss", width: 1 }), opacity: 0.3 },
    { ...line("loss", "y", "chart-1", { title: "smoothed", width: 2 }), x: scaled(curves.axes[axis]), y: smoothed(curves.series.loss.mean, smoothing) },
    { x: evals.map(place), y: evals.map((mark) => Number(mark.heldout_loss)), yaxis: "y", name: "held-out", type: "scatter", mode: "lines+markers", line: { width: 1.6, color: color("chart-2") }, marker: { size: 6 }, text: evals.map((mark) => Number(mark.perplexity).toPrecision(3)), hovertemplate: "%{y:.4~g} (perplexity %{text})", showlegend: false },
    { ...line("memory_peak_bytes", "y2", "chart-5", { title: "peak", unit: "B" }), hovertemplate: "%{y:.3s}B" },
    { ...line("memory_bytes", "y2", "chart-3", { title: "now", unit: "B" }), hovertemplate: "%{y:.3s}B" },
    { x: moments.map(place), y: moments.map((mark) => mark.memory_peak_bytes), yaxis: "y2", name: "", type: "scatter", mode: "markers", marker: { size: 7, color: color("chart-4"), symbol: moments.map((mark) => SYMBOLS[mark.moment] ?? "circle") }, text: moments.map((mark) => `${mark.moment}: ${formatBytes(mark.memory_peak_bytes)}`), hovertemplate: "%{text}", showlegend: false },
    line("learning_rate", "y3", "chart-1", { title: "learning rate" }),
    line("gradient_norm", "y4", "chart-1", { title: "gradient norm" }),
    line("tokens_per_second", "y5", "chart-1", { title: "tokens/s" }),
  ];
  return { traces, layout: layout(axis, [...lines(marks, place), ...expected(forecast)], forecast) };
}

// A dotted line through all rows where the run was resumed.
function lines(marks, place) {
  return marks
    .filter((mark) => mark.kind === "resume")
    .map((mark) => ({ type: "line", xref: "x", yref: "paper", x0: place(mark), x1: place(mark), y0: 0, y1: 1, line: { color: color("paused"), width: 1, dash: "dot" } }));
}

// What was forecast, across the measured memory.
function expected(forecast) {
  if (!forecast) return [];
  return [{ type: "line", xref: "paper", x0: 0, x1: 1, yref: "y2", y0: forecast, y1: forecast, line: { color: color("soft"), width: 1.2, dash: "dash" } }];
}

function layout(axis, shapes, forecast) {
  const text = color("soft");
  const yaxis = ([key, row]) => [key.replace("y", "yaxis"), { domain: row.domain, gridcolor: color("grid"), zeroline: false, tickformat: key === "y2" ? ".2s" : undefined, rangemode: key === "y2" ? "tozero" : "normal", nticks: key === "y" ? 8 : 3, fixedrange: true, automargin: false }];
  const titles = Object.values(ROWS).map((row) => ({ text: row.title, x: 0, xref: "paper", xanchor: "left", y: row.domain[1], yref: "paper", yanchor: "bottom", showarrow: false, font: { size: 12, color: text } }));
  const legend = `<span style="color:${color("chart-1")}">train</span>  <span style="color:${color("chart-2")}">held-out</span>`;
  // On a phone the marks' names would run into the row's title; a touch on a mark tells its name.
  const marks = innerWidth < 600 ? "" : `  <span style="color:${color("chart-4")}">◆ load ★ first step ● eval ■ save</span>`;
  const memory = `<span style="color:${color("chart-3")}">now</span>  <span style="color:${color("chart-5")}">peak</span>${marks}${forecast ? `  – – forecast ${formatBytes(forecast)}` : ""}`;
  const keys = [[legend, ROWS.y], [memory, ROWS.y2]].map(([words, row]) => ({ text: words, x: 1, xref: "paper", xanchor: "right", y: row.domain[1], yref: "paper", yanchor: "bottom", showarrow: false, font: { size: 12 } }));
  return {
    ...Object.fromEntries(Object.entries(ROWS).map(yaxis)),
    xaxis: { anchor: "y5", gridcolor: color("grid"), zeroline: false, title: { text: X_TITLES[axis], standoff: 6 }, showspikes: true, spikemode: "across", spikesnap: "cursor", spikethickness: 1, spikecolor: text, spikedash: "solid" },
    ...baseLayout(),
    margin: { l: 52, r: 12, t: 22, b: 40 },
    hoversubplots: "axis",
    showlegend: false,
    annotations: [...titles, ...keys],
    shapes,
    uirevision: axis, // keeps a person's zoom while points come in
    dragmode: "zoom",
  };
}
