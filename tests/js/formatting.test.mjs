// `node --test tests/js/formatting.test.mjs`: the same cases as for the Python twin.
import assert from "node:assert/strict";
import { test } from "node:test";

import { load, readText } from "./load.mjs";

const cases = JSON.parse(await readText("tests/site/formatting_cases.json"));
const formatting = await load("static/js/formatting.js");

for (const [name, format] of Object.entries(formatting)) {
  const shared = cases[name.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`)];
  test(`${name} formats like its Python twin`, () => {
    assert.ok(shared, `formatting_cases.json has no cases of ${name}`);
    for (const [values, text] of shared) assert.equal(format(...values), text, `of ${values}`);
  });
}
