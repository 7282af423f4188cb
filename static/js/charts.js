// Build one plotly figure from curves: rows that share an x axis, so that zoom and hover apply to
// all. The page's table of metrics defines the metrics and the row of each.
import { smoothValues } from "./curves.js";
import { formatBytes } from "./formatting.js";
import { baseAxis, baseLayout, color } from "./plots.js";

// Two rows have more than their metrics: Loss a smoothed line, Memory markers and a forecast.
const LOSS = "Loss";
const MEMORY = "Memory";
const HEIGHTS = { [LOSS]: 5, [MEMORY]: 2 }; // 1 for all other rows
const GAP = 0.045;
const X_TITLES = { step: "step", total_tokens: "tokens", time: "minutes" };
const SYMBOLS = { load: "diamond", "first step": "star", eval: "circle", save: "square" };

const formatMetricTitle = (metric) => metric.title.toLowerCase();
const formatHover = (metric) => (metric.unit === "bytes" ? "%{y:.3s}B" : "%{y:.4~g}");

// One row per chart of the table, the tallest on top: {title, axis, domain, metrics}.
export function buildChartRows(metrics) {
  const titles = [...new Set(metrics.map((metric) => metric.chart))].filter(Boolean);
  const height = (title) => HEIGHTS[title] ?? 1;
  titles.sort((one, other) => height(other) - height(one));
  const share = (1 - GAP * (titles.length - 1)) / titles.reduce((sum, one) => sum + height(one), 0);
  let top = 1;
  return titles.map((title, index) => {
    const bottom = index === titles.length - 1 ? 0 : top - share * height(title);
    const domain = [bottom, top];
    top = bottom - GAP;
    const rowMetrics = metrics.filter((metric) => metric.chart === title);
    return { title, axis: index ? `y${index + 1}` : "y", domain, metrics: rowMetrics };
  });
}

// Returns a function from an event to its x value. Time is in minutes since the first event.
function createPositionMapper(curves, axis, startTime) {
  const { step } = curves.axes;
  const scale = (value) => (axis === "time" ? (value - startTime) / 60 : value);
  return (event) => {
    if (axis === "step") return event.step;
    if (axis === "time") return scale(event.time);
    let i = step.length - 1; // tokens: those of the nearest earlier step
    while (i > 0 && step[i] > event.step) i -= 1;
    return event.step > 0 && i >= 0 ? curves.axes.total_tokens[i] : 0;
  };
}

export function buildFigure({ metrics, curves, events, axis, smoothing, startTime, forecast }) {
  const rows = buildChartRows(metrics);
  const memory = rows.find((row) => row.title === MEMORY).axis;
  const toX = createPositionMapper(curves, axis, startTime);
  const traces = rows.flatMap((row) =>
    row.metrics.flatMap((metric) =>
      metric.event === "step"
        ? buildStepTraces(metric, row, { curves, axis, smoothing, startTime })
        : [buildEvalTrace(metric, row, { metrics, events, toX })],
    ),
  );
  traces.push(buildMemoryMarkers(events, memory, toX));
  const shapes = [...buildResumeLines(events, toX), ...buildForecastLines(forecast, memory)];
  return { traces, layout: buildLayout(rows, axis, shapes, forecast) };
}

// A metric of every step: its line, and for a loss a smoothed line on top.
function buildStepTraces(metric, row, { curves, axis, smoothing, startTime }) {
  const scaled = (values) => (axis === "time" ? values.map((t) => (t - startTime) / 60) : values);
  const [x, y] = curves.buildRangeLine(axis, metric.name);
  const isSmoothed = row.title === LOSS;
  const line = {
    x: scaled(x),
    y,
    yaxis: row.axis,
    name: formatMetricTitle(metric),
    type: "scatter",
    mode: curves.length === 1 ? "markers" : "lines",
    line: { width: isSmoothed ? 1 : 1.6, color: color(metric.color) },
    hovertemplate: formatHover(metric),
    showlegend: false,
  };
  if (!isSmoothed) return [line];
  const smooth = {
    ...line,
    x: scaled(curves.axes[axis]),
    y: smoothValues(curves.series[metric.name].mean, smoothing),
    name: `${formatMetricTitle(metric)}, smoothed`,
    line: { width: 2, color: color(metric.color) },
  };
  return [{ ...line, opacity: 0.3 }, smooth];
}

// A metric of evaluations. Its hover text adds the metrics of the same event that have no chart.
function buildEvalTrace(metric, row, { metrics, events, toX }) {
  const measured = events.filter((event) => event.kind === metric.event);
  const unchartedMetrics = metrics.filter((other) => other.event === metric.event && !other.chart);
  const formatHoverText = (event) =>
    unchartedMetrics
      .map((one) => `${formatMetricTitle(one)} ${Number(event[one.name]).toPrecision(3)}`)
      .join(", ");
  return {
    x: measured.map(toX),
    y: measured.map((event) => Number(event[metric.name])),
    yaxis: row.axis,
    name: formatMetricTitle(metric),
    type: "scatter",
    mode: "lines+markers",
    line: { width: 1.6, color: color(metric.color) },
    marker: { size: 6 },
    text: measured.map(formatHoverText),
    hovertemplate: unchartedMetrics.length
      ? `${formatHover(metric)} (%{text})`
      : formatHover(metric),
    showlegend: false,
  };
}

function buildMemoryMarkers(events, yaxis, toX) {
  const memoryEvents = events.filter((event) => event.kind === "memory");
  return {
    x: memoryEvents.map(toX),
    y: memoryEvents.map((event) => event.memory_peak_bytes),
    yaxis,
    name: "",
    type: "scatter",
    mode: "markers",
    marker: {
      size: 7,
      color: color("chart-4"),
      symbol: memoryEvents.map((event) => SYMBOLS[event.moment] ?? "circle"),
    },
    text: memoryEvents.map((event) => `${event.moment}: ${formatBytes(event.memory_peak_bytes)}`),
    hovertemplate: "%{text}",
    showlegend: false,
  };
}

// A dotted line through all rows at each step from which the run was resumed.
function buildResumeLines(events, toX) {
  return events
    .filter((event) => event.kind === "resume")
    .map((event) => ({
      type: "line",
      xref: "x",
      yref: "paper",
      x0: toX(event),
      x1: toX(event),
      y0: 0,
      y1: 1,
      line: { color: color("paused"), width: 1, dash: "dot" },
    }));
}

// The memory forecast, as a line across the measured memory.
function buildForecastLines(forecast, yref) {
  if (!forecast) return [];
  const line = { color: color("soft"), width: 1.2, dash: "dash" };
  return [{ type: "line", xref: "paper", x0: 0, x1: 1, yref, y0: forecast, y1: forecast, line }];
}

function buildYAxis({ title, domain, metrics }) {
  const isBytes = metrics[0].unit === "bytes";
  return {
    ...baseAxis(),
    domain,
    tickformat: isBytes ? ".2s" : undefined,
    rangemode: isBytes ? "tozero" : "normal",
    nticks: title === LOSS ? 8 : 3,
    fixedrange: true,
    automargin: false,
  };
}

// Above each row: its title on the left, and on the right the names of its lines in their colors.
function buildRowAnnotations(row, forecast) {
  const above = { xref: "paper", y: row.domain[1], yref: "paper", yanchor: "bottom" };
  const annotation = { ...above, showarrow: false, font: { size: 12 } };
  const title = { ...annotation, text: row.title, x: 0, xanchor: "left" };
  title.font = { size: 12, color: color("soft") };
  if (row.metrics.length === 1) return [title];
  const wrapInColor = (name, text) => `<span style="color:${color(name)}">${text}</span>`;
  const parts = row.metrics.map((metric) =>
    wrapInColor(metric.color, metric.label || formatMetricTitle(metric)),
  );
  if (row.title === MEMORY) {
    // On a phone this legend would overlap the title; tapping a marker shows its name instead.
    if (innerWidth >= 600) parts.push(wrapInColor("chart-4", "◆ load ★ first step ● eval ■ save"));
    if (forecast) parts.push(`– – forecast ${formatBytes(forecast)}`);
  }
  return [title, { ...annotation, text: parts.join("  "), x: 1, xanchor: "right" }];
}

function buildLayout(rows, axis, shapes, forecast) {
  return {
    ...Object.fromEntries(rows.map((row) => [row.axis.replace("y", "yaxis"), buildYAxis(row)])),
    xaxis: {
      ...baseAxis(),
      anchor: rows.at(-1).axis,
      title: { text: X_TITLES[axis], standoff: 6 },
      showspikes: true,
      spikemode: "across",
      spikesnap: "cursor",
      spikethickness: 1,
      spikecolor: color("soft"),
      spikedash: "solid",
    },
    ...baseLayout(),
    margin: { l: 52, r: 12, t: 22, b: 40 },
    hoversubplots: "axis",
    showlegend: false,
    annotations: rows.flatMap((row) => buildRowAnnotations(row, forecast)),
    shapes,
    uirevision: axis, // keeps the user's zoom while points arrive
    dragmode: "zoom",
  };
}
