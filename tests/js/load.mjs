// Modules of static/js that import nothing, in node: as data, since no package.json says that they
// are modules.
import { readFile } from "node:fs/promises";

export const readText = (path) => readFile(new URL(`../../${path}`, import.meta.url), "utf8");
export const load = async (path) =>
  import(`data:text/javascript,${encodeURIComponent(await readText(path))}`);
