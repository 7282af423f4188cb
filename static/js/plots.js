// What every chart needs: plotly once it has arrived, text that plotly cannot read as tags, and the
// page's look.

// Pages do not wait for plotly's 4.8 MB: numbers come while it is still being read.
export const plotlyReady = window.Plotly
  ? Promise.resolve()
  : new Promise((ready) => document.getElementById("plotly").addEventListener("load", ready));

// plotly reads a few tags in names; a name is text.
export const escapeMarkup = (text) =>
  text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

export const color = (name) =>
  getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

// What all charts share: no border, no background of their own, the page's type, one hover for all
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
