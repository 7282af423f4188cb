// The launch page: a plan that comes back late must not undo what was typed since it was asked for.
const form = document.getElementById("launch");
let edits = 0;
let answered = 0;
form.addEventListener("input", () => (edits += 1));
form.addEventListener("htmx:beforeSend", ({ detail }) => (detail.xhr.edits = edits));
document.body.addEventListener("htmx:beforeSwap", ({ detail }) => (answered = detail.xhr.edits ?? edits));
document.body.addEventListener("htmx:oobBeforeSwap", ({ detail }) => {
  if (detail.target.id === "plan" && answered !== edits) detail.shouldSwap = false; // the next answer is on its way
});
