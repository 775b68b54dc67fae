/** The page's language. `i18n.t.runs.title` is typed; a key missing in a translation does not compile. */
import { en } from "../i18n/en";
import { es } from "../i18n/es";
import { hi } from "../i18n/hi";

export type Words = typeof en;
export type Language = "en" | "es" | "hi";

const DICTIONARIES: Record<Language, Words> = { en, es, hi };
export const LANGUAGES: Record<Language, string> = { en: "English", es: "Español", hi: "हिन्दी" };
const KEPT = "simpletuner.language";

function isLanguage(name: string): name is Language {
  return name in DICTIONARIES;
}

function first(): Language {
  const wishes = [localStorage.getItem(KEPT) ?? "", ...navigator.languages];
  return wishes.map((wish) => wish.slice(0, 2).toLowerCase()).find(isLanguage) ?? "en";
}

class I18n {
  #language = $state<Language>(first());

  constructor() {
    document.documentElement.lang = this.#language;
  }

  get language(): Language {
    return this.#language;
  }

  set language(chosen: Language) {
    this.#language = chosen;
    localStorage.setItem(KEPT, chosen);
    document.documentElement.lang = chosen;
  }

  get t(): Words {
    return DICTIONARIES[this.#language];
  }
}

export const i18n = new I18n();
