// Load modules of static/js that have no imports in Node. They are loaded as data URLs, because no
// package.json declares them as modules.
import { readFile } from "node:fs/promises";

export const readText = (path) => readFile(new URL(`../../${path}`, import.meta.url), "utf8");
export const load = async (path) =>
  import(`data:text/javascript,${encodeURIComponent(await readText(path))}`);
