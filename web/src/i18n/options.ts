/** The help texts of the options in the language of the page; English ones come with the schema. */
import { i18n, type Language } from "../lib/i18n.svelte";
import type { OptionInfo } from "../lib/types";
import { helpTexts } from "./helpTexts.svelte";

/** The key of a field that only datasets have, or that has another meaning for them. */
function keyOf(option: OptionInfo): string {
  return option.section === "dataset" ? `dataset.${option.name}` : option.name;
}

export function optionHelp(option: OptionInfo, language: Language = i18n.language): string {
  const texts = helpTexts.of(language);
  return texts[keyOf(option)] ?? texts[option.name] ?? option.text;
}
