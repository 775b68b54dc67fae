/** The language of the pages. `i18n.t.runs.title` is typed; a missing translation does not compile. */
import { en } from "../i18n/en";
import { es } from "../i18n/es";
import { hi } from "../i18n/hi";

export type Texts = typeof en;
export type Language = "en" | "es" | "hi";

const DICTIONARIES: Record<Language, Texts> = { en, es, hi };
export const LANGUAGES: Record<Language, string> = { en: "English", es: "Español", hi: "हिन्दी" };
const STORAGE_KEY = "simpletuner.language";

function isLanguage(name: string): name is Language {
  return name in DICTIONARIES;
}

/** The stored choice, else the first supported language of the browser. */
function initialLanguage(): Language {
  const candidates = [localStorage.getItem(STORAGE_KEY) ?? "", ...navigator.languages];
  return candidates.map((name) => name.slice(0, 2).toLowerCase()).find(isLanguage) ?? "en";
}

class I18n {
  #language = $state<Language>(initialLanguage());

  constructor() {
    document.documentElement.lang = this.#language;
  }

  get language(): Language {
    return this.#language;
  }

  set language(chosen: Language) {
    this.#language = chosen;
    localStorage.setItem(STORAGE_KEY, chosen);
    document.documentElement.lang = chosen;
  }

  get t(): Texts {
    return DICTIONARIES[this.#language];
  }
}

export const i18n = new I18n();
