// Browser notifications when the user's own runs end. The status bar lists the ended runs; each is
// shown once per browser.
const NOTIFIED_KEY = "notified-runs";
const ENABLED_KEY = "notify";
const button = document.querySelector("[data-notify]");

function isEnabled() {
  return (
    localStorage.getItem(ENABLED_KEY) === "1" &&
    "Notification" in window &&
    Notification.permission === "granted"
  );
}

function notifyEndedRuns() {
  const notified = new Set(JSON.parse(localStorage.getItem(NOTIFIED_KEY) ?? "[]"));
  for (const run of document.querySelectorAll("[data-ended-run]")) {
    const key = `${run.dataset.endedRun} ${run.dataset.at}`;
    if (notified.has(key)) continue;
    notified.add(key);
    if (isEnabled()) {
      const notice = new Notification(`${run.dataset.state}: ${run.textContent}`, { tag: key });
      notice.onclick = () => location.assign(`/runs/${run.dataset.endedRun}`);
    }
  }
  localStorage.setItem(NOTIFIED_KEY, JSON.stringify([...notified].slice(-200)));
}

function updateButton() {
  if (!button) return;
  button.textContent = isEnabled()
    ? "Stop notifications in this browser"
    : "Notify me in this browser when a run ends";
  const blocked = "Notification" in window && Notification.permission === "denied";
  document.querySelector("[data-notify-message]").textContent = blocked
    ? "This browser blocks notifications from this site. Allow them in its settings."
    : "";
}

button?.addEventListener("click", async () => {
  if (isEnabled()) localStorage.setItem(ENABLED_KEY, "0");
  else {
    localStorage.setItem(ENABLED_KEY, "1");
    await Notification.requestPermission();
  }
  updateButton();
});
updateButton();
notifyEndedRuns();
document.body.addEventListener("htmx:afterSwap", notifyEndedRuns);
