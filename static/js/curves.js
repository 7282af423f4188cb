// The data of the charts: the buckets of a snapshot, then every live step. Independent of plotly,
// of the page and of the set of metrics: the snapshot defines the series.
const AXES = ["step", "total_tokens", "time"];

function decodeArray(text, Kind) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  return Array.from(new Kind(bytes.buffer));
}

export class Curves {
  constructor() {
    this.axes = Object.fromEntries(AXES.map((name) => [name, []]));
    this.series = {};
    this.points = 0;
    this.raw = true;
  }

  get length() {
    return this.axes.step.length;
  }

  static fromSnapshot(packed) {
    const curves = new Curves();
    curves.raw = packed.raw;
    curves.points = packed.points;
    for (const name of AXES) curves.axes[name] = decodeArray(packed.axes[name], Float64Array);
    for (const [name, parts] of Object.entries(packed.series)) {
      const [mean, low, high] = parts.map((text) => decodeArray(text, Float32Array));
      curves.series[name] = { mean, low: low ?? mean.slice(), high: high ?? mean.slice() };
    }
    return curves;
  }

  static fromLists(lists) {
    const curves = new Curves();
    curves.raw = lists.raw;
    curves.points = lists.points;
    curves.axes = lists.axes;
    for (const [name, { mean, low, high }] of Object.entries(lists.series)) {
      curves.series[name] = { mean, low: low ?? mean, high: high ?? mean };
    }
    return curves;
  }

  addStep(event) {
    this.points += 1;
    for (const name of AXES) this.axes[name].push(name === "time" ? event.time : event[name]);
    for (const [name, parts] of Object.entries(this.series)) {
      const value = Number(event[name]); // "nan" and "inf" are sent as text
      for (const part of Object.values(parts)) part.push(value);
    }
  }

  // Remove the points after `step`, which a resumed run trains again.
  rewindTo(step) {
    let count = this.length;
    while (count > 0 && this.axes.step[count - 1] > step) count -= 1;
    for (const name of AXES) this.axes[name].length = count;
    for (const parts of Object.values(this.series)) {
      for (const part of new Set(Object.values(parts))) part.length = count;
    }
  }

  // x and y of the faint line, which goes from the low to the high of each bucket, so that every
  // spike is drawn at any zoom level.
  buildRangeLine(axis, name) {
    const { low, high } = this.series[name];
    if (this.raw) return [this.axes[axis], low];
    const x = [];
    const y = [];
    this.axes[axis].forEach((position, i) => {
      x.push(position);
      y.push(low[i]);
      if (high[i] !== low[i]) {
        x.push(position);
        y.push(high[i]);
      }
    });
    return [x, y];
  }
}

// Exponential moving average with bias correction, as in TensorBoard. Weight 0 returns the values.
export function smoothValues(values, weight) {
  let last = 0;
  let norm = 0;
  return values.map((value) => {
    if (!Number.isFinite(value)) return null;
    last = weight * last + (1 - weight) * value;
    norm = weight * norm + (1 - weight);
    return last / norm;
  });
}
