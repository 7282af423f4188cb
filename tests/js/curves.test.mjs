// Tests of the chart data: `node --test tests/js/curves.test.mjs`.
import assert from "node:assert/strict";
import { test } from "node:test";

import { load } from "./load.mjs";

const { Curves, smoothValues } = await load("static/js/curves.js");
const pack = (Kind, values) => Buffer.from(Kind.from(values).buffer).toString("base64");
const snapshot = (steps, series) => ({
  raw: true,
  points: steps.length,
  axes: Object.fromEntries(
    ["step", "total_tokens", "time"].map((name) => [name, pack(Float64Array, steps)]),
  ),
  series: Object.fromEntries(
    Object.entries(series).map(([name, values]) => [name, [pack(Float32Array, values)]]),
  ),
});
const step = (number, more) => ({ step: number, total_tokens: number, time: number, ...more });

test("a metric of the snapshot continues with live steps", () => {
  const curves = Curves.fromSnapshot(snapshot([1, 2], { entropy: [0.5, 0.25] }));
  curves.addStep(step(3, { entropy: 0.125, loss: 9 }));
  assert.deepEqual(curves.buildRangeLine("step", "entropy"), [
    [1, 2, 3],
    [0.5, 0.25, 0.125],
  ]);
  assert.deepEqual(Object.keys(curves.series), ["entropy"]);
  assert.equal(curves.points, 3);
});

test("a rewind removes the repeated steps from every series", () => {
  const curves = Curves.fromSnapshot(snapshot([1, 2, 3], { loss: [3, 2, 1], entropy: [1, 1, 1] }));
  curves.rewindTo(1);
  assert.deepEqual(curves.axes.step, [1]);
  for (const { mean, low, high } of Object.values(curves.series)) {
    assert.deepEqual([mean.length, low.length, high.length], [1, 1, 1]);
  }
});

test("the line of a bucket goes from its low to its high", () => {
  const part = { mean: [2], low: [1], high: [50] };
  const axes = { step: [7], total_tokens: [7], time: [7] };
  const curves = Curves.fromLists({ raw: false, points: 512, axes, series: { loss: part } });
  assert.deepEqual(curves.buildRangeLine("step", "loss"), [
    [7, 7],
    [1, 50],
  ]);
});

test("smoothing starts at the first value and skips values that are not finite", () => {
  const values = smoothValues([2, NaN, 2], 0.9).map((value) => value && Number(value.toFixed(6)));
  assert.deepEqual(values, [2, null, 2]);
  assert.deepEqual(smoothValues([1, 3], 0), [1, 3]);
});
