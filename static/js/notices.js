// A browser notification when a run of one's own ends. The strip brings the news; each run is told
// once in a browser.
const TOLD = "told-runs";
const WANTED = "notify";
const button = document.querySelector("[data-notify]");

function wanted() {
  return (
    localStorage.getItem(WANTED) === "1" &&
    "Notification" in window &&
    Notification.permission === "granted"
  );
}

function tell() {
  const told = new Set(JSON.parse(localStorage.getItem(TOLD) ?? "[]"));
  for (const run of document.querySelectorAll("[data-ended-run]")) {
    const key = `${run.dataset.endedRun} ${run.dataset.at}`;
    if (told.has(key)) continue;
    told.add(key);
    if (wanted()) {
      const notice = new Notification(`${run.dataset.state}: ${run.textContent}`, { tag: key });
      notice.onclick = () => location.assign(`/runs/${run.dataset.endedRun}`);
    }
  }
  localStorage.setItem(TOLD, JSON.stringify([...told].slice(-200)));
}

function show() {
  if (!button) return;
  button.textContent = wanted()
    ? "Stop telling me in this browser"
    : "Tell me in this browser when a run ends";
  const blocked = "Notification" in window && Notification.permission === "denied";
  document.querySelector("[data-notify-words]").textContent = blocked
    ? "This browser blocks notifications from here; allow them in its settings."
    : "";
}

button?.addEventListener("click", async () => {
  if (wanted()) localStorage.setItem(WANTED, "0");
  else {
    localStorage.setItem(WANTED, "1");
    await Notification.requestPermission();
  }
  show();
});
show();
tell();
document.body.addEventListener("htmx:afterSwap", tell);
