// The live page of one run: socket -> curves -> chart, header, samples. What the view shows lives
// in the address.
import { figure } from "./charts.js";
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

const TOO_MANY = 8000; // live points drawn one by one, before a new snapshot puts them into buckets
const metrics = JSON.parse(document.getElementById("metrics").textContent);
// What the chart marks besides steps.
const MARKED_KINDS = new Set(["memory", "resume", ...metrics.map((metric) => metric.event)]);
MARKED_KINDS.delete("step");
const page = document.getElementById("run");
const chart = document.getElementById("chart");
const view = new URLSearchParams(location.search);
const part = (name) => page.querySelector(`[data-${name}]`);
const config = { displayModeBar: false, responsive: true, doubleClick: "reset" };

const trials = new Trials(part("trials"));

let curves = new Curves();
let zoomed = null;
let events = []; // those that the chart marks
let began = null;
let state = page.dataset.state;
let latest = null; // what the socket last said of the run; a header that comes late must not undo it
let asked = false;
let seq = 0;
let drawing = false;

// The page brings the picture as it was when it was made; the socket goes on from there.
const first = JSON.parse(document.getElementById("snapshot").textContent);
const live = new LiveRun(page.dataset.socket, first.run, first.points, first.upto);
live.addEventListener("open", () => connection("live", false));
live.addEventListener("closed", () => connection("connection lost; trying again…", true));
live.addEventListener("refused", ({ detail }) => connection(detail.reason, true));
live.addEventListener("snap", ({ detail: snapshot }) => showSnapshot(snapshot));
function showSnapshot(snapshot) {
  curves = Curves.fromSnapshot(snapshot.curves);
  events = [];
  trials.clear();
  zoomed = null;
  part("samples").dataset.filled = "";
  began = snapshot.events[0]?.time ?? snapshot.state.started_at;
  snapshot.events.forEach(note); // its curves are rewound already
  show(snapshot.state, snapshot.upto);
}
live.addEventListener("delta", ({ detail: delta }) => {
  delta.events.forEach(take);
  show(delta.state, delta.last);
  if (curves.length > TOO_MANY) live.again();
});

function note(event) {
  began ??= event.time;
  if (event.kind === "sample") addSample(event);
  trials.take(event);
  if (event.kind === "tuned" && event.seq > first.upto) refresh();
  if (MARKED_KINDS.has(event.kind)) events.push(event);
}

function take(event) {
  note(event);
  if (event.kind === "step") curves.add(event);
  if (event.kind === "resume") {
    if (!curves.raw) return live.again(); // a bucket cannot be cut
    curves.rewind(event.step);
    events = events.filter((one) => one.step <= event.step || one.kind === "resume");
  }
}

function show(now, upto) {
  seq = upto;
  latest = now;
  if (
    now.state !== state ||
    ("message" in now && now.message !== (header("message")?.textContent ?? ""))
  ) {
    state = now.state;
    refresh().then(() => fill(latest));
    for (const tab of page.querySelectorAll('[role="tab"][aria-selected="true"][hx-get]'))
      htmx.trigger(tab, "refresh");
  }
  fill(now);
  draw();
}

const refresh = () =>
  htmx.ajax("GET", page.dataset.header, { target: "#header", swap: "innerHTML" });
const header = (name) => page.querySelector(`[data-live="${name}"]`);

function fill(now) {
  header("phase").textContent = now.phase;
  header("progress").value = now.progress;
  header("left").textContent = timeLeft(now);
  header("step").textContent = [now.step, now.total_steps || null]
    .filter((count) => count !== null)
    .map(formatInteger)
    .join(" / ");
  header("loss").textContent = formatLoss(now.loss) || "–";
  header("heldout").textContent = formatLoss(now.eval_loss) || "–";
  header("peak").textContent = formatBytes(now.peak_memory_bytes || null) || "–";
  header("label").textContent = now.label;
}

function timeLeft({ seconds_left: left, waits }) {
  if (left != null) return `about ${formatDuration(left)} left`;
  if (!waits?.at) return "";
  return `Should start: ${formatStart(waits.earliest, waits.latest, Date.now() / 1000)}`;
}

function draw() {
  if (asked) return;
  asked = true;
  requestAnimationFrame(async () => {
    asked = false;
    if (drawing) return draw();
    drawing = true;
    const upto = seq;
    const axis = part("axis").value;
    const { traces, layout } = figure({
      metrics,
      curves: zoomed ?? curves,
      events,
      axis,
      smoothing: Number(part("smoothing").value),
      began,
      forecast: Number(page.dataset.forecast),
    });
    await plotlyReady;
    chart.classList.remove("skeleton");
    await Plotly.react(chart, traces, layout, config);
    if (!chart.dataset.ready) {
      chart.dataset.ready = "1";
      chart.on("plotly_relayout", onZoom);
    }
    drawing = false;
    requestAnimationFrame(() =>
      document.dispatchEvent(
        new CustomEvent("drawn", { detail: { seq: upto, points: curves.points } }),
      ),
    );
  });
}

// Zoomed in, buckets give way to the points behind them.
async function onZoom(change) {
  const left = change["xaxis.range[0]"];
  if (change["xaxis.autorange"]) return wholeRun();
  if (left == null) return;
  part("whole").hidden = false;
  if (curves.raw && !zoomed) return;
  const [first, last] = [left, change["xaxis.range[1]"]].map(stepAt);
  const query = new URLSearchParams({
    points: first.points,
    first_step: Math.max(0, Math.floor(first)),
    last_step: Math.max(1, Math.ceil(last)),
  });
  const answer = await fetch(`${page.dataset.metrics}?${query}`);
  if (!answer.ok) return connection(`zoom failed (${answer.status})`, true);
  zoomed = Curves.fromLists(await answer.json());
  draw();
}

function wholeRun() {
  zoomed = null;
  part("whole").hidden = true;
  draw();
}

function stepAt(x) {
  const axis = part("axis").value;
  if (axis === "step") return x;
  const value = axis === "time" ? x * 60 + began : x;
  const index = curves.axes[axis].findIndex((place) => place >= value);
  return curves.axes.step[index < 0 ? curves.length - 1 : index] ?? 0;
}

function addSample(event) {
  const box = part("samples");
  if (!box.dataset.filled) box.replaceChildren();
  box.dataset.filled = "1";
  const sample = document.createElement("article");
  sample.className = "sample";
  const add = (kind, words) => {
    const line = document.createElement("div");
    line.className = kind;
    line.textContent = words;
    sample.append(line);
  };
  add("soft small", `step ${formatInteger(event.step)}`);
  add("", event.prompt);
  add("answer", event.answer || "(no answer)");
  add("soft small", `expected: ${event.expected}`);
  box.prepend(sample);
}

function connection(words, off) {
  part("connection").textContent = words;
  part("connection").classList.toggle("off", off);
}

for (const name of ["axis", "smoothing"]) {
  const knob = part(name);
  if (view.has(name)) knob.value = view.get(name);
  knob.addEventListener("input", () => {
    view.set(name, knob.value);
    history.replaceState(null, "", `?${view}`);
    if (name === "axis") wholeRun();
    draw();
  });
}
part("whole").addEventListener("click", () => Plotly.relayout(chart, { "xaxis.autorange": true }));
document.addEventListener("theme", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
showSnapshot(first);
