// The launch page. A late response must not undo edits that the user made after its request.
const form = document.getElementById("launch");
const editedFields = new Map(); // name -> value, checked, number of the edit
let editCount = 0;
let answeredEdits = 0;
// Move the slider of a field to the value that is nearest to the field's.
const moveSlider = (name, text) => {
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
  else moveSlider(field.name, field.value);
  editedFields.set(field.name, {
    value: field.value,
    checked: field.checked,
    at: (editCount += 1),
  });
});
form.addEventListener("htmx:beforeSend", ({ detail }) => (detail.xhr.editCount = editCount));
document.body.addEventListener(
  "htmx:beforeSwap",
  ({ detail }) => (answeredEdits = detail.xhr.editCount ?? editCount),
);

// Swapping the summary while its button is pressed would lose the click. Skip the swap and request
// the summary again after the button is released.
let isPressed = false;
let hasMissedSwap = false;
form.addEventListener(
  "pointerdown",
  ({ target, button }) => (isPressed = button === 0 && Boolean(target.closest("button"))),
);
document.body.addEventListener("htmx:beforeSwap", ({ detail }) => {
  if (!isPressed || detail.target.id !== "summary") return;
  detail.shouldSwap = false;
  hasMissedSwap = true;
});
for (const kind of ["pointerup", "pointercancel"])
  document.addEventListener(kind, () =>
    setTimeout(() => {
      // after the click
      if (hasMissedSwap) htmx.trigger(document.body, "measured");
      isPressed = hasMissedSwap = false;
    }),
  );
document.body.addEventListener("htmx:oobBeforeSwap", ({ detail }) => {
  // a newer response will follow
  if (detail.target.id === "plan" && answeredEdits !== editCount) detail.shouldSwap = false;
});
document.body.addEventListener("htmx:afterSwap", () => {
  const newerEdits = [...editedFields].filter(([, { at }]) => at > answeredEdits);
  for (const [name, { value, checked }] of newerEdits) {
    const field =
      name === "method" ? document.getElementById(`method-${value}`) : form.elements[name];
    if (!field || field instanceof RadioNodeList) continue; // missing, or several of this name
    if (field.type === "checkbox" || field.type === "radio") field.checked = checked;
    else field.value = value;
    moveSlider(name, value);
  }
});
