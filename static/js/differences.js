// The tables of a comparison: the color of each column, and a checkbox that shows equal rows.
const page = document.getElementById("compare");
const same = page.querySelectorAll("[data-same]");

for (const swatch of page.querySelectorAll("[data-swatch]"))
  swatch.style.background = `var(--chart-${Number(swatch.dataset.swatch) + 1})`;
page
  .querySelector("[data-all]")
  .addEventListener("change", ({ target }) =>
    same.forEach((row) => (row.hidden = !target.checked)),
  );
page.querySelector("[data-none]").hidden =
  page.querySelectorAll("[data-settings] tr:not([data-same])").length > 1;
