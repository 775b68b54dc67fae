/** Numbers, sizes, times in the page's language. Durations are seconds, sizes bytes, times unix seconds. */
import { i18n } from "./i18n.svelte";

export function number(value: number, digits = 0): string {
  return new Intl.NumberFormat(i18n.language, { maximumFractionDigits: digits }).format(value);
}

/** With its sign and four decimals: "+0.0123", "-0.0040". */
export function signed(value: number): string {
  const options: Intl.NumberFormatOptions = { signDisplay: "exceptZero", minimumFractionDigits: 4, maximumFractionDigits: 4 };
  return new Intl.NumberFormat(i18n.language, options).format(value);
}

/** Four significant digits; very small ones as 1.5e-5. */
export function precise(value: number): string {
  if (value !== 0 && Math.abs(value) < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e");
  return new Intl.NumberFormat(i18n.language, { maximumSignificantDigits: 4 }).format(value);
}

export function percent(part: number): string {
  return new Intl.NumberFormat(i18n.language, { style: "percent" }).format(part);
}

const SIZES = ["B", "KiB", "MiB", "GiB", "TiB"];

export function bytes(size: number): string {
  const power = size < 1 ? 0 : Math.min(SIZES.length - 1, Math.floor(Math.log2(size) / 10));
  const value = size / 1024 ** power;
  return `${number(value, power === 0 || value >= 100 ? 0 : 1)} ${SIZES[power]}`;
}

function unit(value: number, name: "day" | "hour" | "minute" | "second", digits = 0): string {
  return new Intl.NumberFormat(i18n.language, {
    style: "unit",
    unit: name,
    unitDisplay: "narrow",
    maximumFractionDigits: digits,
  }).format(value);
}

/** The two largest parts: "2d 3h", "1h 5m", "42s". */
export function duration(seconds: number): string {
  if (seconds < 10) return unit(seconds, "second", seconds < 1 ? 2 : 1);
  const whole = Math.round(seconds);
  if (whole < 60) return unit(whole, "second");
  if (whole < 3600) return `${unit(Math.floor(whole / 60), "minute")} ${unit(whole % 60, "second")}`;
  const hours = Math.floor(whole / 3600);
  if (hours < 24) return `${unit(hours, "hour")} ${unit(Math.floor((whole % 3600) / 60), "minute")}`;
  return `${unit(Math.floor(hours / 24), "day")} ${unit(hours % 24, "hour")}`;
}

/** "14:05" today, "21 Nov, 14:05" on another day. */
export function moment(time: number): string {
  const then = new Date(time * 1000);
  const today = then.toDateString() === new Date().toDateString();
  const day: Intl.DateTimeFormatOptions = today ? {} : { day: "numeric", month: "short" };
  return new Intl.DateTimeFormat(i18n.language, { ...day, hour: "2-digit", minute: "2-digit" }).format(then);
}
