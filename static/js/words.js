// Numbers as people read them. The Python twin is snapml_site/templatetags/words.py.
export function size(bytes) {
  if (bytes == null) return "";
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (Math.abs(bytes) < 1000) return unit === "B" || unit === "kB" ? `${bytes.toFixed(0)} ${unit}` : `${bytes.toFixed(1)} ${unit}`;
    bytes /= 1000;
  }
  return `${bytes.toFixed(1)} TB`;
}

export function duration(seconds) {
  if (seconds < 60) return `${Math.round(seconds)} s`;
  if (seconds < 3600) return `${Math.round(seconds / 60)} min`;
  return `${Math.floor(seconds / 3600)} h ${Math.round((seconds % 3600) / 60)} min`;
}

export const loss = (value) => (value == null ? "–" : value.toFixed(3));
export const whole = (value) => value.toLocaleString("en-US");

// "3" of "3 min", where the other has the same unit.
const shorter = (one, other) => (one.split(" ").slice(1).join() === other.split(" ").slice(1).join() ? one.split(" ")[0] : one);

// The range in which a waiting run should start, from now.
export function startWords(waits) {
  if (!waits?.at) return "";
  if (waits.earliest == null) return "Should start: nobody can tell yet";
  const soon = Math.max(0, waits.earliest - Date.now() / 1000);
  if (waits.latest == null) return soon > 60 ? `Should start not before ${duration(soon)}` : "Should start: nobody can tell yet";
  const late = Math.max(soon, waits.latest - Date.now() / 1000);
  return late < 60 ? "Should start within a minute" : `Should start in ${shorter(duration(soon), duration(late))} to ${duration(late)}`;
}
