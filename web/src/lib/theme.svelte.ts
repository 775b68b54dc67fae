/** The light or dark theme: the system's, or the user's choice. */

export type Theme = "system" | "light" | "dark";
const STORAGE_KEY = "simpletuner.theme";
const system = matchMedia("(prefers-color-scheme: dark)");

function initialTheme(): Theme {
  const stored = localStorage.getItem(STORAGE_KEY);
  return stored === "light" || stored === "dark" ? stored : "system";
}

class Themes {
  #choice = $state<Theme>(initialTheme());
  #systemDark = $state(system.matches);

  constructor() {
    this.#apply();
    system.addEventListener("change", () => {
      this.#systemDark = system.matches;
    });
  }

  get choice(): Theme {
    return this.#choice;
  }

  set choice(chosen: Theme) {
    this.#choice = chosen;
    localStorage.setItem(STORAGE_KEY, chosen);
    this.#apply();
  }

  /** True for the dark theme. Charts, which do not follow CSS, read their colours again when it changes. */
  get dark(): boolean {
    return this.#choice === "dark" || (this.#choice === "system" && this.#systemDark);
  }

  #apply(): void {
    document.documentElement.dataset.theme = this.#choice;
  }
}

export const theme = new Themes();
