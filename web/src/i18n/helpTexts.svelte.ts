/** The catalogues of help texts, each loaded when its language is first used. */
import type { Language } from "../lib/i18n.svelte";

type Catalogue = Record<string, string>;

const LOADERS: Partial<Record<Language, () => Promise<{ default: Catalogue }>>> = {
  es: () => import("./options/es.json"),
  hi: () => import("./options/hi.json"),
};

class HelpTexts {
  #loaded = $state.raw<Partial<Record<Language, Catalogue>>>({});
  readonly #requested = new Set<Language>();

  /** The catalogue of a language; empty until it is loaded, and for English. */
  of(language: Language): Catalogue {
    const load = LOADERS[language];
    if (load !== undefined && !this.#requested.has(language)) {
      this.#requested.add(language);
      void load().then((module) => (this.#loaded = { ...this.#loaded, [language]: module.default }));
    }
    return this.#loaded[language] ?? {};
  }
}

export const helpTexts = new HelpTexts();
