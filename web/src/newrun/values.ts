/** Conversion of option values between the draft and the controls. Invalid text is stored in the draft as it is,
 * and the server reports the problem. */
import { optionHelp } from "../i18n/options";
import type { OptionInfo } from "../lib/types";

export type Values = Record<string, unknown>;
const NUMBER = /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i;

export function isEqual(a: unknown, b: unknown): boolean {
  return JSON.stringify(a ?? null) === JSON.stringify(b ?? null);
}

/** Convert the text of a control to a value; undefined means "not given". */
export function fromText(option: OptionInfo, text: string): unknown {
  const word = text.trim();
  if (word === "" && option.nullable) return option.default === null ? undefined : null;
  if (option.kind === "integer" || option.kind === "number") {
    if (word === "") return undefined;
    const value = Number(word);
    const exact = !Number.isInteger(value) || Number.isSafeInteger(value);
    return NUMBER.test(word) && exact ? value : word;
  }
  if (option.kind === "count" && /^\d{1,15}$/.test(word)) return Number(word);
  if (option.structured && /^[[{]/.test(word)) return parseJson(word) ?? text;
  return text;
}

/** Parse JSON; returns undefined for invalid text. */
export function parseJson(text: string): unknown {
  try {
    return JSON.parse(text) as unknown;
  } catch {
    return undefined;
  }
}

/** Convert a value to the text of a control. */
export function toText(value: unknown): string {
  if (value === null || value === undefined) return "";
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

/** Return the values with one option set; undefined and the default remove it. */
export function withValue(values: Values, option: OptionInfo, value: unknown): Values {
  const { [option.name]: _, ...rest } = values;
  return value === undefined || isEqual(value, option.default) ? rest : { ...rest, [option.name]: value };
}

function isAllowed(allowed: unknown[], current: unknown): boolean {
  return allowed.some((value) =>
    value !== null && typeof value === "object" && "not" in value ? !isEqual(value.not, current) : isEqual(value, current),
  );
}

/** True if the other options give this one an effect. */
export function meetsNeeds(option: OptionInfo, values: Values, options: Map<string, OptionInfo>): boolean {
  const isMet = ([name, allowed]: [string, unknown[]]) =>
    isAllowed(allowed, name in values ? values[name] : options.get(name)?.default);
  const alternatives = Object.entries(option.needs_any);
  return Object.entries(option.needs).every(isMet) && (alternatives.length === 0 || alternatives.some(isMet));
}

/** True if the name, another accepted name or the help of the option contains all words. */
export function matches(option: OptionInfo, words: string): boolean {
  const names = [option.name, ...option.aliases];
  const text = [...names, ...names.map((name) => name.replaceAll("_", " ")), option.text, optionHelp(option)].join(" ").toLowerCase();
  return words.toLowerCase().split(/\s+/).every((word) => text.includes(word));
}
