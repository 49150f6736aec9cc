// Numbers as text. The status has 64-bit numbers and durations as strings, as JSON of protobuf does.

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

/** Bytes in the largest unit of which there is at least one. */
export function bytes(count) {
  let value = Number(count), unit = 0;
  while (value >= 1024 && unit < UNITS.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${rounded(value)} ${UNITS[unit]}`;
}

/** A number with its thousands apart. */
export function count(value) {
  return Number(value).toLocaleString("en-US");
}

/** A large number in short: 134.5M. */
export function short(value) {
  for (const [size, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
    if (Number(value) >= size) return rounded(Number(value) / size) + letter;
  return rounded(Number(value));
}

/** One of a few: "1 lease", "2 leases". */
export function several(number, noun, nouns = `${noun}s`) {
  return `${count(number)} ${Number(number) === 1 ? noun : nouns}`;
}

/** The seconds of a protobuf duration, as "1.5s". */
export function secondsOf(duration) {
  return parseFloat(duration ?? "0");
}

/** A span of time in the two largest units, or in one below a minute. */
export function span(seconds) {
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 60) return `${Math.round(seconds)} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return both(minutes, "min", Math.floor(seconds % 60), "s");
  const hours = Math.floor(minutes / 60);
  if (hours < 48) return both(hours, "h", minutes % 60, "min");
  return both(Math.floor(hours / 24), "d", hours % 24, "h");
}

function both(large, unit, small, smallUnit) {
  return small ? `${large} ${unit} ${small} ${smallUnit}` : `${large} ${unit}`;
}

/** A part of a whole in percent. */
export function percent(part, whole) {
  return whole ? `${rounded((100 * part) / whole)} %` : "–";
}

/** The name of an enum's value, in small letters. */
export function nameOf(value, prefix) {
  return value.replace(prefix, "").toLowerCase();
}

function rounded(value) {
  if (value >= 100 || Number.isInteger(value)) return String(Math.round(value));
  return value.toFixed(value >= 10 ? 1 : 2).replace(/\.?0+$/, "");
}
