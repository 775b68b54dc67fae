/** Options between the draft and the controls. A value that cannot be read stays the text that was written:
 * it is kept in the draft, and the server's reader says what is wrong with it. */
import type { OptionInfo } from "../lib/types";

export type Values = Record<string, unknown>;
const NUMBER = /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i;

export function same(one: unknown, other: unknown): boolean {
  return JSON.stringify(one ?? null) === JSON.stringify(other ?? null);
}

/** What the text of a control means; undefined is "not given". */
export function read(option: OptionInfo, text: string): unknown {
  const word = text.trim();
  if (word === "" && option.nullable) return option.default === null ? undefined : null;
  if (option.kind === "integer" || option.kind === "number") {
    if (word === "") return undefined;
    const value = Number(word);
    const exact = !Number.isInteger(value) || Number.isSafeInteger(value);
    return NUMBER.test(word) && exact ? value : word;
  }
  if (option.structured && /^[[{]/.test(word)) return parsed(word) ?? text;
  return text;
}

/** A list or object, or undefined when the text is none. */
export function parsed(text: string): unknown {
  try {
    return JSON.parse(text) as unknown;
  } catch {
    return undefined;
  }
}

export function write(value: unknown): string {
  if (value === null || value === undefined) return "";
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

/** The values with one of them set; undefined and the default take it out. */
export function changed(values: Values, option: OptionInfo, value: unknown): Values {
  const { [option.name]: _, ...rest } = values;
  return value === undefined || same(value, option.default) ? rest : { ...rest, [option.name]: value };
}

function fulfilled(allowed: unknown[], now: unknown): boolean {
  return allowed.some((value) =>
    value !== null && typeof value === "object" && "not" in value ? !same(value.not, now) : same(value, now),
  );
}

/** Returns whether the other options let this one have an effect. */
export function needed(option: OptionInfo, values: Values, options: Map<string, OptionInfo>): boolean {
  const holds = ([name, allowed]: [string, unknown[]]) =>
    fulfilled(allowed, name in values ? values[name] : options.get(name)?.default);
  const alternatives = Object.entries(option.needs_any);
  return Object.entries(option.needs).every(holds) && (alternatives.length === 0 || alternatives.some(holds));
}

export function matches(option: OptionInfo, words: string): boolean {
  const text = `${option.name} ${option.name.replaceAll("_", " ")} ${option.text}`.toLowerCase();
  return words.toLowerCase().split(/\s+/).every((word) => text.includes(word));
}
