// The trials before a run: a row each as they go, parallel coordinates of their settings, and the loss against the steps spent.
import { axisLook, colour, look } from "./charts.js";
import { duration, loss, whole } from "./words.js";

const OUTCOMES = { running: "running", stopped: "stopped early", done: "went all the way", failed: "failed" };
const config = { displayModeBar: false, responsive: true };

export class Trials {
  constructor(box, plotly) {
    this.box = box;
    this.plotly = plotly;
    this.clear();
  }

  clear() {
    this.trials = new Map();
    this.verdict = null;
  }

  take(event) {
    if (event.kind === "trial") this.trials.set(event.number, event);
    else if (event.kind === "tuned") this.verdict = event;
    else return;
    if (this.asked) return;
    this.asked = true;
    requestAnimationFrame(() => {
      this.asked = false;
      this.draw();
    });
  }

  draw() {
    if (!this.trials.size) return;
    this.box.hidden = false;
    const trials = [...this.trials.values()].sort((a, b) => a.number - b.number);
    const newest = trials.reduce((a, b) => (b.spent > a.spent ? b : a));
    const part = (name) => this.box.querySelector(`[data-${name}]`);
    part("verdict").textContent = this.verdict?.words ?? `${whole(newest.spent)} of ${whole(newest.budget)} steps of trials are done. The first is the plan's own guess; the better half goes on each time.`;
    part("verdict").classList.toggle("good", Boolean(this.verdict));
    part("rows").replaceChildren(...trials.map((trial) => this.row(trial)));
    this.plotly.then(() => this.charts(trials, part));
  }

  row(trial) {
    const best = this.verdict?.winner === trial.number;
    const line = document.createElement("tr");
    line.classList.toggle("best", best);
    const { learning_rate: rate, rank, alpha, target_modules: layers } = trial.settings;
    const name = `${trial.number + 1}${trial.number ? "" : ", the plan's guess"}`;
    const state = best ? "goes on" : OUTCOMES[trial.outcome];
    for (const [kind, words] of [["", name], ["number", rate.toPrecision(3)], ["number", rank], ["number", alpha], ["", layers], ["number", `${trial.steps} / ${trial.whole}`], ["number", loss(last(trial))], ["number", trial.seconds ? duration(trial.seconds) : ""], ["", state]]) {
      const cell = document.createElement("td");
      cell.className = kind;
      cell.textContent = words;
      line.append(cell);
    }
    return line;
  }

  charts(trials, part) {
    const told = trials.filter((trial) => trial.losses.length);
    if (!told.length) return;
    const losses = told.map(last);
    const layers = [...new Set(told.map((trial) => trial.settings.target_modules))];
    const values = (name) => told.map((trial) => trial.settings[name]);
    const ranks = [...new Set(values("rank"))].sort((a, b) => a - b);
    const dimensions = [
      { label: "learning rate (log10)", values: values("learning_rate").map(Math.log10) },
      { label: "rank", values: values("rank").map((rank) => ranks.indexOf(rank)), tickvals: ranks.map((_, i) => i), ticktext: ranks.map(String), range: [-0.2, ranks.length - 0.8] },
      { label: "alpha", values: values("alpha") },
      { label: "layers", values: values("target_modules").map((name) => layers.indexOf(name)), tickvals: layers.map((_, i) => i), ticktext: layers.map((name) => (name.length > 14 ? `${name.slice(0, 13)}…` : name)), range: [-0.2, layers.length - 0.8] },
      { label: "held-out loss", values: losses },
    ];
    const line = { color: losses, colorscale: [[0, colour("chart-1")], [1, colour("chart-2")]] };
    const parallel = { type: "parcoords", dimensions, line, labelfont: { color: colour("text") }, tickfont: { color: colour("soft") }, rangefont: { color: "rgba(0,0,0,0)" } };
    Plotly.react(part("parallel"), [parallel], { ...look(), margin: { l: 70, r: 70, t: 40, b: 20 } }, config);

    const bySpent = told.slice().sort((a, b) => a.spent - b.spent);
    const best = bySpent.map((_, i) => Math.min(...bySpent.slice(0, i + 1).filter((trial) => trial.outcome === "done" || trial.number === 0).map(last)));
    const traces = [
      { x: bySpent.map((trial) => trial.spent), y: bySpent.map(last), text: bySpent.map((trial) => `trial ${trial.number + 1}, ${OUTCOMES[trial.outcome]} at step ${trial.steps}`), mode: "markers", marker: { color: colour("chart-1"), size: 8 }, hovertemplate: "%{text}: %{y:.4g}<extra></extra>" },
      { x: bySpent.map((trial) => trial.spent), y: best, mode: "lines", line: { shape: "hv", color: colour("chart-2"), width: 2 }, hovertemplate: "best so far: %{y:.4g}<extra></extra>" },
    ];
    const axes = { xaxis: { ...axisLook(), title: { text: "steps spent on trials" } }, yaxis: { ...axisLook(), title: { text: "held-out loss" } } };
    Plotly.react(part("spent"), traces, { ...look(), ...axes, hovermode: "closest", showlegend: false, margin: { l: 56, r: 12, t: 12, b: 44 } }, config);
  }
}

const last = (trial) => trial.losses.at(-1)?.[1];
