// The launch page: an answer that comes back late must not undo what a person did since it was
// asked for.
const form = document.getElementById("launch");
const typed = new Map(); // name -> what stands in the field, and after how many edits
let edits = 0;
let answered = 0;
// A slider stands at the value that is nearest to its field's.
const follow = (name, text) => {
  const slider = form.querySelector(`[data-slides="${CSS.escape(name)}"]`);
  if (!slider) return;
  const value = parseInt(text, 10) || 0;
  const values = slider.dataset.values.split(",").map(Number);
  slider.value = values.reduce(
    (best, one, at) => (Math.abs(one - value) < Math.abs(values[best] - value) ? at : best),
    0,
  );
};
form.addEventListener("input", ({ target }) => {
  const slides = target.dataset.slides;
  const field = slides ? form.elements[slides] : target;
  if (slides) field.value = target.dataset.values.split(",")[target.value];
  else follow(field.name, field.value);
  typed.set(field.name, { value: field.value, checked: field.checked, at: (edits += 1) });
});
form.addEventListener("htmx:beforeSend", ({ detail }) => (detail.xhr.edits = edits));
document.body.addEventListener(
  "htmx:beforeSwap",
  ({ detail }) => (answered = detail.xhr.edits ?? edits),
);

// A card that is swapped while its button is pressed would swallow the click: it is asked for again
// when the button is let go.
let pressed = false;
let missed = false;
form.addEventListener(
  "pointerdown",
  ({ target, button }) => (pressed = button === 0 && Boolean(target.closest("button"))),
);
document.body.addEventListener("htmx:beforeSwap", ({ detail }) => {
  if (!pressed || detail.target.id !== "card") return;
  detail.shouldSwap = false;
  missed = true;
});
for (const kind of ["pointerup", "pointercancel"])
  document.addEventListener(kind, () =>
    setTimeout(() => {
      // after the click
      if (missed) htmx.trigger(document.body, "measured");
      pressed = missed = false;
    }),
  );
document.body.addEventListener("htmx:oobBeforeSwap", ({ detail }) => {
  // the next answer is on its way
  if (detail.target.id === "plan" && answered !== edits) detail.shouldSwap = false;
});
document.body.addEventListener("htmx:afterSwap", () => {
  const later = [...typed].filter(([, { at }]) => at > answered);
  for (const [name, { value, checked }] of later) {
    const field =
      name === "method" ? document.getElementById(`method-${value}`) : form.elements[name];
    if (!field || field instanceof RadioNodeList) continue; // gone, or several of one name
    if (field.type === "checkbox" || field.type === "radio") field.checked = checked;
    else field.value = value;
    follow(name, value);
  }
});
