// The list of runs: the selection survives refreshes of the table and can be compared or archived.
const MAX_COMPARED_RUNS = 10;
const form = document.getElementById("chosen");
const chosen = new Set();

function updateSelection() {
  const bulk = form.querySelector("[data-bulk]");
  bulk.hidden = chosen.size === 0;
  form.querySelector("[data-count]").textContent = `${chosen.size} selected`;
  const compare = form.querySelector("[data-compare-button]");
  compare.disabled = chosen.size < 2 || chosen.size > MAX_COMPARED_RUNS;
  compare.textContent =
    chosen.size > MAX_COMPARED_RUNS ? `Compare (at most ${MAX_COMPARED_RUNS})` : "Compare";
  for (const box of form.querySelectorAll("input[name=run]")) box.checked = chosen.has(box.value);
}

if (form) {
  form.addEventListener("change", ({ target }) => {
    if (target.name !== "run") return;
    if (target.checked) chosen.add(target.value);
    else chosen.delete(target.value);
    updateSelection();
  });
  form.addEventListener("click", ({ target }) => {
    if (target.closest("[data-compare-button]"))
      location.assign(`${form.dataset.compare}?${[...chosen].map((id) => `run=${id}`).join("&")}`);
  });
  document.body.addEventListener("htmx:afterSwap", updateSelection);
}
