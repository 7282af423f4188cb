// The launch page: an answer that comes back late must not undo what a person did since it was asked for.
const form = document.getElementById("launch");
let edits = 0;
let answered = 0;
let technique = null;
form.addEventListener("input", () => (edits += 1));
form.addEventListener("htmx:beforeSend", ({ detail }) => (detail.xhr.edits = edits));
document.body.addEventListener("htmx:beforeSwap", ({ detail }) => {
  answered = detail.xhr.edits ?? edits;
  technique = detail.target.id === "techniques" ? form.elements.method?.value : null;
});
document.body.addEventListener("htmx:oobBeforeSwap", ({ detail }) => {
  if (detail.target.id === "plan" && answered !== edits) detail.shouldSwap = false; // the next answer is on its way
});
// Costs come one by one, each with all techniques: the one that is chosen stays so.
document.body.addEventListener("htmx:afterSwap", () => {
  const box = technique && document.getElementById(`technique-${technique}`);
  if (box) box.checked = true;
  technique = null;
});
