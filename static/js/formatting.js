// Formats numbers for people. The Python twin is training/formatting.py;
// tests/site/formatting_cases.json holds the test cases of both.

// Rounds like Python: an exact half goes to the even neighbor, while toFixed rounds it up.
function fixed(value, decimals) {
  const rounded = value.toFixed(decimals);
  const exact = value.toFixed(decimals + 30);
  const isHalf = /^50*$/.test(exact.slice(-30));
  if (!isHalf || Number(rounded.at(-1)) % 2 === 0) return rounded;
  return exact.slice(0, -30).replace(/\.$/, "");
}

export function formatBytes(bytes) {
  if (bytes == null) return "";
  for (const [unit, decimals] of [
    ["B", 0],
    ["kB", 0],
    ["MB", 1],
    ["GB", 1],
  ]) {
    if (Math.abs(Number(fixed(bytes, decimals))) < 1000) return `${fixed(bytes, decimals)} ${unit}`;
    bytes /= 1000;
  }
  return `${fixed(bytes, 1)} TB`;
}

export const formatInteger = (count) => count.toLocaleString("en-US", { maximumFractionDigits: 0 });
export const formatLoss = (loss) => (loss == null ? "" : fixed(loss, 3));

export function formatDuration(seconds) {
  if (seconds == null) return "";
  if (Number(fixed(seconds, 0)) < 60) return `${fixed(seconds, 0)} s`;
  const minutes = Number(fixed(seconds / 60, 0));
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

// The estimated start of a queued run. All three are epoch seconds.
export function formatStart(earliest, latest, now) {
  const unknown = "unknown";
  if (earliest == null) return unknown;
  const soon = Math.max(0, earliest - now);
  if (latest == null) return soon > 60 ? `not before ${formatDuration(soon)}` : unknown;
  const late = Math.max(soon, latest - now);
  if (late < 60) return "within a minute";
  const [first, last] = [formatDuration(soon), formatDuration(late)];
  const unitOf = (text) => text.slice(text.indexOf(" "));
  return `in ${unitOf(first) === unitOf(last) ? first.split(" ")[0] : first} to ${last}`;
}
