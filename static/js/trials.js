// The trials of a run: a table, parallel coordinates of their settings, and their loss curves.
import { formatDuration, formatInteger, formatLoss } from "./formatting.js";
import { baseAxis, baseLayout, color, plotlyReady } from "./plots.js";

const OUTCOMES = {
  running: "running",
  stopped: "stopped early",
  done: "completed",
  failed: "failed",
};
const config = { displayModeBar: false, responsive: true };

export class Trials {
  constructor(box) {
    this.box = box;
    this.clear();
  }

  clear() {
    this.trials = new Map();
    this.verdict = null;
  }

  addEvent(event) {
    if (event.kind === "trial") this.trials.set(event.number, event);
    else if (event.kind === "tuned") this.verdict = event;
    else return;
    if (this.isDrawRequested) return;
    this.isDrawRequested = true;
    requestAnimationFrame(() => {
      this.isDrawRequested = false;
      this.drawTrials();
    });
  }

  drawTrials() {
    if (!this.trials.size) return;
    this.box.hidden = false;
    const trials = [...this.trials.values()].sort((a, b) => a.number - b.number);
    const newest = trials.reduce((a, b) => (b.spent > a.spent ? b : a));
    const getElement = (name) => this.box.querySelector(`[data-${name}]`);
    const [spent, budget] = [newest.spent, newest.budget].map(formatInteger);
    const progress =
      `${spent} of ${budget} steps of trials are done. ` +
      "The first trial has the planned settings. The better half continues each time.";
    getElement("verdict").textContent = this.verdict?.message ?? progress;
    getElement("verdict").classList.toggle("good", Boolean(this.verdict));
    getElement("rows").replaceChildren(...trials.map((trial) => this.buildRow(trial)));
    plotlyReady.then(() => this.drawCharts(trials, getElement));
  }

  buildRow(trial) {
    const best = this.verdict?.winner === trial.number;
    const line = document.createElement("tr");
    line.classList.toggle("best", best);
    const { learning_rate: rate, rank, alpha, target_modules: layers } = trial.settings;
    const name = `${trial.number + 1}${trial.number ? "" : ", planned settings"}`;
    const state = best ? "selected" : OUTCOMES[trial.outcome];
    const cells = [
      ["", name],
      ["number", rate.toPrecision(3)],
      ["number", rank],
      ["number", alpha],
      ["", layers],
      ["number", `${trial.steps} / ${trial.full_steps}`],
      ["number", formatLoss(getLastLoss(trial)) || "–"],
      ["number", trial.seconds ? formatDuration(trial.seconds) : ""],
      ["", state],
    ];
    for (const [kind, text] of cells) {
      const cell = document.createElement("td");
      cell.className = kind;
      cell.textContent = text;
      line.append(cell);
    }
    return line;
  }

  drawCharts(trials, getElement) {
    const measuredTrials = trials.filter((trial) => trial.losses.length);
    if (!measuredTrials.length) return;
    const best =
      this.verdict?.winner ??
      measuredTrials.reduce((a, b) =>
        b.steps > a.steps || (b.steps === a.steps && getLastLoss(b) < getLastLoss(a)) ? b : a,
      ).number;
    const line = (trial) => ({
      color: color(trial.number === best ? "chart-2" : trial.number ? "chart-1" : "chart-3"),
      width: trial.number === best ? 3 : 1.4,
    });
    const shared = (trial) => ({
      type: "scatter",
      mode: "lines+markers",
      line: line(trial),
      opacity: trial.number === best ? 1 : 0.6,
      showlegend: false,
    });
    const axes = buildDimensions(measuredTrials);
    const parallel = measuredTrials.map((trial) => ({
      ...shared(trial),
      x: axes.map((axis) => axis.name),
      y: axes.map((axis) => axis.position(trial)),
      text: axes.map((axis) => `trial ${trial.number + 1}: ${axis.format(trial)}`),
      hovertemplate: "%{text}<extra></extra>",
    }));
    const ends = axes.flatMap((axis) =>
      [
        [axis.high, 1, "bottom"],
        [axis.low, 0, "top"],
      ].map(([text, y, yanchor]) => ({
        x: axis.name,
        y,
        yanchor,
        text: text,
        showarrow: false,
        font: { size: 11, color: color("soft") },
      })),
    );
    const hiddenAxis = { visible: false, range: [-0.12, 1.12], fixedrange: true };
    Plotly.react(
      getElement("parallel"),
      parallel,
      {
        ...baseLayout(),
        hovermode: "closest",
        xaxis: { ...baseAxis(), type: "category", fixedrange: true, side: "bottom" },
        yaxis: hiddenAxis,
        annotations: ends,
        margin: { l: 40, r: 40, t: 8, b: 30 },
      },
      config,
    );
    const curves = measuredTrials.map((trial) => ({
      ...shared(trial),
      x: trial.losses.map(([step]) => step),
      y: trial.losses.map(([, value]) => value),
      name: `trial ${trial.number + 1}`,
      hovertemplate: `trial ${trial.number + 1}, step %{x}: %{y:.4g}<extra></extra>`,
    }));
    Plotly.react(
      getElement("spent"),
      curves,
      {
        ...baseLayout(),
        hovermode: "closest",
        xaxis: { ...baseAxis(), title: { text: "steps spent on a trial" }, rangemode: "tozero" },
        yaxis: { ...baseAxis(), title: { text: "held-out loss" } },
        margin: { l: 56, r: 12, t: 12, b: 44 },
      },
      config,
    );
  }
}

// The parallel axes. Each maps a trial to a position from 0 to 1 and formats values and both ends.
function buildDimensions(trials) {
  const numeric = (name, value, format, scale = (x) => x) => {
    const values = trials.map(value);
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const position = (trial) =>
      high > low ? (scale(value(trial)) - scale(low)) / (scale(high) - scale(low)) : 0.5;
    return {
      name,
      position,
      format: (trial) => format(value(trial)),
      low: high > low ? format(low) : "",
      high: format(high),
    };
  };
  const layers = [...new Set(trials.map((trial) => trial.settings.target_modules))];
  const shortenName = (name) => (name.length > 16 ? `${name.slice(0, 15)}…` : name);
  return [
    numeric(
      "learning rate",
      (trial) => trial.settings.learning_rate,
      (value) => value.toPrecision(3),
      Math.log,
    ),
    numeric("rank", (trial) => trial.settings.rank, String, Math.log),
    numeric("alpha", (trial) => trial.settings.alpha, String, Math.log),
    {
      name: "layers",
      position: (trial) =>
        layers.length > 1
          ? layers.indexOf(trial.settings.target_modules) / (layers.length - 1)
          : 0.5,
      format: (trial) => trial.settings.target_modules,
      low: layers.length > 1 ? shortenName(layers[0]) : "",
      high: shortenName(layers.at(-1)),
    },
    numeric("held-out loss", getLastLoss, formatLoss),
  ];
}

const getLastLoss = (trial) => trial.losses.at(-1)?.[1];
