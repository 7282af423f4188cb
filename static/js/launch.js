// The card beside the launch form: what will happen, and a button that names what is missing.
import { whole } from "./words.js";

const form = document.getElementById("launch");
const card = (name) => form.querySelector(`[data-card="${name}"]`);
const value = (name) => Number(form.elements[name].value);

function show() {
  const model = form.elements.model.selectedOptions[0];
  const data = form.elements.data.selectedOptions[0];
  card("model").textContent = model?.value ? `${model.text}, ${model.dataset.words}` : "not chosen";
  card("data").textContent = data?.value ? `${whole(Number(data.dataset.rows))} rows, ${whole(Number(data.dataset.heldout))} held out` : "not chosen";
  const [budget, times] = [value("tokens_per_batch"), value("accumulation")];
  card("step").textContent = times > 1 ? `${whole(budget)} x ${times} = ${whole(budget * times)} tokens at most` : `${whole(budget)} tokens at most`;
  card("length").textContent = value("max_steps") ? `${whole(value("max_steps"))} steps` : `${value("epochs")} time${value("epochs") === 1 ? "" : "s"} through the data`;
  const missing = !model?.value ? "Choose a base model" : !data?.value ? "Choose data" : "";
  const button = form.querySelector("[data-go]");
  button.textContent = missing || "Start run";
  button.disabled = Boolean(missing);
}

form.addEventListener("input", show);
form.addEventListener("submit", () => {
  const button = form.querySelector("[data-go]");
  button.disabled = true;
  button.textContent = "Starting…";
});
addEventListener("pageshow", show);
