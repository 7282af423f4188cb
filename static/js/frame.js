// Common to all pages: theme switch, dialogs, tabs and keyboard shortcuts.
const script = document.querySelector('script[src$="frame.js"]');
const isDark = () => getComputedStyle(document.documentElement).colorScheme.includes("dark");

document.addEventListener("click", (event) => {
  const target = event.target.closest(
    "[data-theme-switch], [data-open], [data-close], [data-tab]",
  );
  if (!target) return;
  if ("themeSwitch" in target.dataset) switchTheme();
  else if (target.dataset.open) document.getElementById(target.dataset.open).showModal();
  else if ("close" in target.dataset) target.closest("dialog").close();
  else showTab(target);
});

// A menu closes on a click elsewhere, on Escape, and when one of its items opens a dialog.
function closeMenus(except) {
  for (const menu of document.querySelectorAll("details.menu[open]"))
    if (menu !== except) menu.open = false;
}
document.addEventListener("click", ({ target }) =>
  closeMenus(target.closest("[data-open]") ? null : target.closest("details.menu")),
);
document.addEventListener("keydown", ({ key }) => key === "Escape" && closeMenus(null));

// htmx gives the focus to the new copy of a field, but loses a selection that starts at 0: with all
// of the old value selected, "12" typed over "0" became "120".
let selectionBeforeSwap = null;
document.addEventListener("htmx:beforeSwap", () => {
  const { id, selectionStart: start, selectionEnd: end } = document.activeElement;
  selectionBeforeSwap = id && start === 0 && end > 0 ? { id, end } : null;
});
document.addEventListener("htmx:afterSwap", () => {
  const field = document.activeElement;
  if (field.id === selectionBeforeSwap?.id && field.selectionStart === field.selectionEnd)
    field.setSelectionRange(0, selectionBeforeSwap.end);
});

function switchTheme() {
  const theme = isDark() ? "light" : "dark";
  localStorage.setItem("theme", theme);
  document.documentElement.dataset.theme = theme;
  document.dispatchEvent(new CustomEvent("theme"));
}

function showTab(tab) {
  for (const other of tab.parentElement.querySelectorAll("[data-tab]")) {
    const isSelected = other === tab;
    other.setAttribute("aria-selected", isSelected);
    document.getElementById(`tab-${other.dataset.tab}`).hidden = !isSelected;
  }
}

const shortcuts = {
  r: script.dataset.runs,
  d: script.dataset.data,
  a: script.dataset.adapters,
  m: script.dataset.models,
  g: script.dataset.gpus,
};
let isAfterG = false;
document.addEventListener("keydown", (event) => {
  if (
    event.ctrlKey ||
    event.metaKey ||
    event.altKey ||
    event.target.closest("input, textarea, select, dialog[open]")
  )
    return;
  const shortcutAddress = isAfterG && shortcuts[event.key];
  isAfterG = event.key === "g" && !isAfterG;
  if (shortcutAddress) location.href = shortcutAddress;
  else if (event.key === "?") document.getElementById("keys")?.showModal();
  else if (event.key === "n") location.href = script.dataset.newRun;
  else if (event.key === "/" && document.querySelector("[data-search]")) {
    event.preventDefault();
    document.querySelector("[data-search]").focus();
  }
});
