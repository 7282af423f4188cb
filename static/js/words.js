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
