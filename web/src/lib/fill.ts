import { i18n } from "./i18n.svelte";

/** Replace {name} in a text by a value, and {name|singular|plural} by the form that the language uses for it. */
export function fill(text: string, values: Record<string, string | number>): string {
  const plural = new Intl.PluralRules(i18n.language);
  return text.replace(/\{(\w+)(?:\|([^|}]*)\|([^|}]*))?\}/g, (match, name: string, singular?: string, others?: string) => {
    const value = values[name];
    if (value === undefined) return match;
    if (singular === undefined || others === undefined) return String(value);
    return plural.select(Number(value)) === "one" ? singular : others;
  });
}
