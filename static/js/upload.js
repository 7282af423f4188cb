// Upload with drag and drop, progress, Cancel, and a size check before anything is sent.
import { formatBytes } from "./formatting.js";

const form = document.getElementById("new-data");
const getElement = (name) => form.querySelector(`[data-${name}]`);
const file = form.elements.file;
const LIMIT = Number(form.dataset.limit);
let request = null;

function showProblem(message) {
  getElement("problem").textContent = message;
  getElement("problem").hidden = !message;
  getElement("sending").hidden = true;
  form.querySelector("button.main").disabled = false;
}

function sendUpload() {
  const bytes = [...form.querySelectorAll("input[type=file]")].reduce(
    (sum, input) => sum + (input.files[0]?.size ?? 0),
    0,
  );
  if (bytes > LIMIT) {
    const most = form.dataset.limitText;
    return showProblem(`The upload has ${formatBytes(bytes)}. The maximum is ${most}.`);
  }
  showProblem("");
  form.querySelector("button.main").disabled = true;
  getElement("sending").hidden = !bytes;
  request = new XMLHttpRequest();
  request.open("POST", form.action || location.href);
  request.setRequestHeader("Accept", "application/json");
  request.responseType = "json";
  const startedAt = performance.now();
  request.upload.onprogress = ({ loaded, total }) => {
    form.querySelector("progress").value = loaded / total;
    const rate = loaded / ((performance.now() - startedAt) / 1000);
    const sent = `${formatBytes(loaded)} of ${formatBytes(total)}, ${formatBytes(rate)}/s`;
    getElement("sent").textContent = loaded < total ? sent : "Uploaded. Reading the first rows…";
  };
  request.onload = () => {
    if (request.status === 200 && request.response?.url) location.assign(request.response.url);
    else
      showProblem(
        request.response?.error?.message ??
          `The server responded with ${request.status}. Nothing was saved.`,
      );
  };
  request.onerror = () => showProblem("The upload was interrupted. Nothing was saved. Try again.");
  request.onabort = () => showProblem("Canceled. Nothing was saved.");
  request.send(new FormData(form));
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  sendUpload();
});
getElement("cancel").addEventListener("click", () => request?.abort());

const drop = getElement("drop");
for (const name of ["dragenter", "dragover"]) {
  drop.addEventListener(name, (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
}
for (const name of ["dragleave", "drop"])
  drop.addEventListener(name, () => drop.classList.remove("over"));
drop.addEventListener("drop", (event) => {
  event.preventDefault();
  if (!event.dataTransfer.files.length) return;
  file.files = event.dataTransfer.files;
  sendUpload();
});
