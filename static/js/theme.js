// Before the first paint: the chosen theme, if one was chosen. Without it the page follows the
// system.
const chosenTheme = localStorage.getItem("theme");
if (chosenTheme) document.documentElement.dataset.theme = chosenTheme;
