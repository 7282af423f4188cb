// Common to all charts: loading plotly, escaping text, and the style of the page.

// Pages do not wait for plotly's 4.8 MB. Their data may arrive first.
export const plotlyReady = window.Plotly
  ? Promise.resolve()
  : new Promise((ready) => document.getElementById("plotly").addEventListener("load", ready));

// plotly interprets some tags in names, so names are escaped.
export const escapeMarkup = (text) =>
  text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

export const color = (name) =>
  getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

// The layout of all charts: no border, no background, the font of the page, one hover box for all
// lines.
export const baseLayout = () => ({
  font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: color("soft") },
  paper_bgcolor: "rgba(0,0,0,0)",
  plot_bgcolor: "rgba(0,0,0,0)",
  hoverlabel: {
    bgcolor: color("card"),
    bordercolor: color("line"),
    font: { color: color("text") },
  },
  hovermode: "x unified",
});
export const baseAxis = () => ({ gridcolor: color("grid"), zeroline: false });
