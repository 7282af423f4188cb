// The live page of one run: socket -> curves -> chart, header, samples. Axis and smoothing are in
// the URL.
import { buildFigure } from "./charts.js";
import { Curves } from "./curves.js";
import {
  formatBytes,
  formatDuration,
  formatInteger,
  formatLoss,
  formatStart,
} from "./formatting.js";
import { plotlyReady } from "./plots.js";
import { LiveRun } from "./socket.js";
import { Trials } from "./trials.js";

const MAX_LIVE_POINTS = 8000; // with more, request a new snapshot with the points in buckets
const metrics = JSON.parse(document.getElementById("metrics").textContent);
// Kinds of events that the chart marks, besides steps.
const MARKED_KINDS = new Set(["memory", "resume", ...metrics.map((metric) => metric.event)]);
MARKED_KINDS.delete("step");
const page = document.getElementById("run");
const chart = document.getElementById("chart");
const urlParams = new URLSearchParams(location.search);
const getElement = (name) => page.querySelector(`[data-${name}]`);
const config = { displayModeBar: false, responsive: true, doubleClick: "reset" };

const trials = new Trials(getElement("trials"));

let curves = new Curves();
let zoomedCurves = null;
let events = []; // of MARKED_KINDS
let startTime = null;
let state = page.dataset.state;
let latestState = null; // the last status from the socket; a late header must not undo it
let isDrawRequested = false;
let seq = 0;
let isDrawing = false;

// The page contains a snapshot; the socket continues from it.
const initialSnapshot = JSON.parse(document.getElementById("snapshot").textContent);
const live = new LiveRun(
  page.dataset.socket,
  initialSnapshot.run,
  initialSnapshot.points,
  initialSnapshot.upto,
);
live.addEventListener("open", () => showConnection("live", false));
live.addEventListener("closed", () => showConnection("connection lost; trying again…", true));
live.addEventListener("refused", ({ detail }) => showConnection(detail.reason, true));
live.addEventListener("snap", ({ detail: snapshot }) => showSnapshot(snapshot));
function showSnapshot(snapshot) {
  curves = Curves.fromSnapshot(snapshot.curves);
  events = [];
  trials.clear();
  zoomedCurves = null;
  getElement("samples").dataset.filled = "";
  startTime = snapshot.events[0]?.time ?? snapshot.state.started_at;
  snapshot.events.forEach(handleEvent); // the curves of a snapshot have no superseded points
  showState(snapshot.state, snapshot.upto);
}
live.addEventListener("delta", ({ detail: delta }) => {
  delta.events.forEach(applyEvent);
  showState(delta.state, delta.last);
  if (curves.length > MAX_LIVE_POINTS) live.requestSnapshot();
});

function handleEvent(event) {
  startTime ??= event.time;
  if (event.kind === "sample") addSample(event);
  trials.addEvent(event);
  if (event.kind === "tuned" && event.seq > initialSnapshot.upto) refreshHeader();
  if (MARKED_KINDS.has(event.kind)) events.push(event);
}

function applyEvent(event) {
  handleEvent(event);
  if (event.kind === "step") curves.addStep(event);
  if (event.kind === "resume") {
    if (!curves.raw) return live.requestSnapshot(); // a bucket cannot be split
    curves.rewindTo(event.step);
    events = events.filter((one) => one.step <= event.step || one.kind === "resume");
  }
}

function showState(now, upto) {
  seq = upto;
  latestState = now;
  if (
    now.state !== state ||
    ("message" in now && now.message !== (findHeaderField("message")?.textContent ?? ""))
  ) {
    state = now.state;
    refreshHeader().then(() => fillHeader(latestState));
    for (const tab of page.querySelectorAll('[role="tab"][aria-selected="true"][hx-get]'))
      htmx.trigger(tab, "refresh");
  }
  fillHeader(now);
  scheduleDraw();
}

const refreshHeader = () =>
  htmx.ajax("GET", page.dataset.header, { target: "#header", swap: "innerHTML" });
const findHeaderField = (name) => page.querySelector(`[data-live="${name}"]`);

function fillHeader(now) {
  findHeaderField("phase").textContent = now.phase;
  findHeaderField("progress").value = now.progress;
  findHeaderField("left").textContent = formatTimeLeft(now);
  findHeaderField("step").textContent = [now.step, now.total_steps || null]
    .filter((count) => count !== null)
    .map(formatInteger)
    .join(" / ");
  findHeaderField("loss").textContent = formatLoss(now.loss) || "–";
  findHeaderField("eval_loss").textContent = formatLoss(now.eval_loss) || "–";
  findHeaderField("peak").textContent = formatBytes(now.peak_memory_bytes || null) || "–";
  findHeaderField("label").textContent = now.label;
}

function formatTimeLeft({ seconds_left: left, queue_info }) {
  if (left != null) return `about ${formatDuration(left)} left`;
  if (!queue_info?.position) return "";
  const { earliest, latest } = queue_info;
  return `Estimated start: ${formatStart(earliest, latest, Date.now() / 1000)}`;
}

function scheduleDraw() {
  if (isDrawRequested) return;
  isDrawRequested = true;
  requestAnimationFrame(async () => {
    isDrawRequested = false;
    if (isDrawing) return scheduleDraw();
    isDrawing = true;
    const upto = seq;
    const axis = getElement("axis").value;
    const { traces, layout } = buildFigure({
      metrics,
      curves: zoomedCurves ?? curves,
      events,
      axis,
      smoothing: Number(getElement("smoothing").value),
      startTime,
      forecast: Number(page.dataset.forecast),
    });
    await plotlyReady;
    chart.classList.remove("skeleton");
    await Plotly.react(chart, traces, layout, config);
    if (!chart.dataset.ready) {
      chart.dataset.ready = "1";
      chart.on("plotly_relayout", zoomTo);
    }
    isDrawing = false;
    requestAnimationFrame(() =>
      document.dispatchEvent(
        new CustomEvent("drawn", { detail: { seq: upto, points: curves.points } }),
      ),
    );
  });
}

// Replace the buckets in the zoomed range with smaller ones, or with their points.
async function zoomTo(change) {
  const left = change["xaxis.range[0]"];
  if (change["xaxis.autorange"]) return resetZoom();
  if (left == null) return;
  getElement("reset-zoom").hidden = false;
  if (curves.raw && !zoomedCurves) return;
  const [first, last] = [left, change["xaxis.range[1]"]].map(findStepAt);
  const query = new URLSearchParams({
    points: initialSnapshot.points,
    first_step: Math.max(0, Math.floor(first)),
    last_step: Math.max(1, Math.ceil(last)),
  });
  const response = await fetch(`${page.dataset.metrics}?${query}`);
  if (!response.ok) return showConnection(`zoom failed (${response.status})`, true);
  zoomedCurves = Curves.fromLists(await response.json());
  scheduleDraw();
}

function resetZoom() {
  zoomedCurves = null;
  getElement("reset-zoom").hidden = true;
  scheduleDraw();
}

function findStepAt(x) {
  const axis = getElement("axis").value;
  if (axis === "step") return x;
  const value = axis === "time" ? x * 60 + startTime : x;
  const index = curves.axes[axis].findIndex((position) => position >= value);
  return curves.axes.step[index < 0 ? curves.length - 1 : index] ?? 0;
}

function addSample(event) {
  const box = getElement("samples");
  if (!box.dataset.filled) box.replaceChildren();
  box.dataset.filled = "1";
  const sample = document.createElement("article");
  sample.className = "sample";
  const add = (kind, text) => {
    const line = document.createElement("div");
    line.className = kind;
    line.textContent = text;
    sample.append(line);
  };
  add("soft small", `step ${formatInteger(event.step)}`);
  add("", event.prompt);
  add("answer", event.answer || "(no answer)");
  add("soft small", `expected: ${event.expected}`);
  box.prepend(sample);
}

function showConnection(message, off) {
  getElement("connection").textContent = message;
  getElement("connection").classList.toggle("off", off);
}

for (const name of ["axis", "smoothing"]) {
  const control = getElement(name);
  if (urlParams.has(name)) control.value = urlParams.get(name);
  control.addEventListener("input", () => {
    urlParams.set(name, control.value);
    history.replaceState(null, "", `?${urlParams}`);
    if (name === "axis") resetZoom();
    scheduleDraw();
  });
}
getElement("reset-zoom").addEventListener("click", () =>
  Plotly.relayout(chart, { "xaxis.autorange": true }),
);
document.addEventListener("theme", scheduleDraw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", scheduleDraw);
showSnapshot(initialSnapshot);
